# steer-heal: every recipe installs what it needs into .venv on first use.

set shell := ["bash", "-euo", "pipefail", "-c"]

python := ".venv/bin/python"
export OMP_WAIT_POLICY := "passive"
# Of the tests, which sync each event of each run to disk: in memory if 4 GB are free there.
scratch := `if [ -z "${TMPDIR:-}" ] && [ -w /dev/shm ] && [ "$(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 { print $4 }')" -gt 4000000 ] 2>/dev/null; then echo /dev/shm; else echo "${TMPDIR:-/tmp}"; fi`

# List the recipes.
default:
    @just --list

# Create .venv and install; does nothing when it is up to date.
setup:
    @if [ ! -e .venv/.installed ] || [ pyproject.toml -nt .venv/.installed ] || [ constraints.txt -nt .venv/.installed ]; then \
        python3 -c 'import sys; assert sys.version_info >= (3, 11), f"steer-heal needs Python 3.11 or newer, this is {sys.version.split()[0]}"'; \
        [ -x {{python}} ] || python3 -m venv .venv; \
        {{python}} -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)"; \
        {{python}} -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'; \
        touch .venv/.installed; \
    fi

# Every stage on a tiny random model, with runtime shape checks: about a minute, meaningless numbers.
fast-dev-run *flags: setup
    BEARTYPE=1 {{python}} -m steer_heal run fast-dev {{flags}}

# Four rounds on the bundled trained model: a real result in minutes on a laptop.
toy *flags: setup
    {{python}} -m steer_heal run toy {{flags}}

# Two rounds that teach the toy model the distribution of itself prompted and steered (docs/distil.md): minutes.
toy-distil *flags: setup
    {{python}} -m steer_heal run toy-distil {{flags}}

# The same by the older recipe, tokens of steered text; downloads 93 MB on first use.
smol *flags: setup
    {{python}} -m steer_heal run smol {{flags}}

# SmolLM2-135M-Instruct takes on love, taught by the difference between the personas (docs/teacher.md).
smol-distil *flags: setup
    {{python}} -m steer_heal run smol-distil {{flags}}

# google/gemma-3-4b-it on one 24 GB card.
run *flags: setup
    {{python}} -m steer_heal run gemma {{flags}}

# Continue a run that was stopped.
resume run *flags: setup
    {{python}} -m steer_heal resume "{{run}}" {{flags}}

# Check a run's events, vectors, checkpoints and base weights against their recorded hashes.
verify run: setup
    {{python}} -m steer_heal verify "{{run}}"

# Draw the pictures and the page of runs again from their events.jsonl.
plot +runs: setup
    {{python}} -m steer_heal report {{runs}}

# Kill and damage small runs, resume them, and count what was lost (docs/reliability.md).
drill *flags: setup
    OMP_NUM_THREADS=1 {{python}} scripts/fault_drill.py {{flags}}

# One question, one table: `just diag csweep --trait love`; `just diag --help` lists the questions.
diag question *flags: setup
    {{python}} -m steer_heal diag {{question}} {{flags}}

# Many runs from one file: `just sweep studies/toy_arms.toml --jobs 2` (docs/sweeps.md).
sweep *flags: setup
    {{python}} -m steer_heal sweep {{flags}}

# Arms of out/results.tsv, of runs that were started one by one: mean, sd and n over seeds.
results *flags: setup
    {{python}} scripts/results.py {{flags}}

# Talk to a run's base, steered and healed states: `just chat out/<run>`, with `--web` in the browser.
chat run *flags: setup
    {{python}} -m steer_heal chat "{{run}}" {{flags}}

# Measure a state of a run again (`--run out/<run>`), or any model, with or without an adapter.
eval *flags: setup
    {{python}} -m steer_heal eval {{flags}}

# Train the bundled toy model again (about 20 minutes on 2 cores).
train-toylm *flags: setup
    {{python}} scripts/train_toylm.py {{flags}}

# The documentation as a site in out/site; a warning is an error.
docs: setup
    {{python}} -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
    NO_MKDOCS_2_WARNING=1 {{python}} -m mkdocs build --strict --site-dir out/site

# Lint, formatting and types.
check: setup
    {{python}} -m ruff check
    {{python}} -m ruff format --check
    {{python}} -m basedpyright

# The tests, a file at a time on each of two cores, the longest first: models this small run no faster on two.
test *flags: setup
    TMPDIR="{{scratch}}" OMP_NUM_THREADS=1 {{python}} -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder {{flags}}

# The tests of optional packages, which `just test` skips where a package is missing: minutes.
test-extras *flags: setup
    {{python}} -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,tasks,inspect,docs,peers,ray,tensorboard,trackio,wandb]'
    {{python}} -c 'import lm_eval, datasets, inspect_ai, material, ray, tensorboard, trackio, trl, wandb'
    RAY=1 OMP_NUM_THREADS=1 {{python}} -m pytest -q -rs tests/test_packaging.py tests/test_peer.py tests/test_ray.py tests/test_share.py tests/test_track.py {{flags}}

# The tests again, counting the lines and branches that run. The last line of the table is the total.
coverage *flags: setup
    OMP_NUM_THREADS=1 {{python}} -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term:skip-covered {{flags}}

# Change the numbers of spec.md one at a time and see that a test fails each time; `just mutate heal.py` takes a part.
mutate *words: setup
    OMP_NUM_THREADS=1 {{python}} scripts/mutate.py {{words}}

# Random damage to files, flags, texts and events: `just fuzz 20000` takes minutes on one core (docs/bad_input.md).
fuzz examples="2000" *flags: setup
    FUZZ={{examples}} OMP_NUM_THREADS=1 {{python}} -m pytest -q --durations=0 tests/test_fuzz.py tests/test_fuzz_models.py {{flags}}
