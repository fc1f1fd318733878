# steer-heal: every recipe installs what it needs into .venv on first use.

set shell := ["bash", "-euo", "pipefail", "-c"]

python := ".venv/bin/python"
export OMP_WAIT_POLICY := "passive"

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

# Every stage on a tiny random model, with runtime shape checks: under a minute, meaningless numbers.
fast-dev-run *flags: setup
    BEARTYPE=1 {{python}} -m steer_heal.run fast-dev {{flags}}

# Four rounds on the bundled trained model: a real result in minutes on a laptop.
toy *flags: setup
    {{python}} -m steer_heal.run toy {{flags}}

# google/gemma-3-4b-it on one 24 GB card.
run *flags: setup
    {{python}} -m steer_heal.run gemma {{flags}}

# Draw trajectory.png of a run again from its events.jsonl.
plot +runs: setup
    {{python}} -m steer_heal.plot {{runs}}

# Measure one model, with or without an adapter.
eval *flags: setup
    {{python}} -m steer_heal.evals {{flags}}

# Train the bundled toy model again (about 20 minutes on 2 cores).
train-toylm *flags: setup
    {{python}} scripts/train_toylm.py {{flags}}

# The tests.
test *flags: setup
    {{python}} -m pytest -q {{flags}}
