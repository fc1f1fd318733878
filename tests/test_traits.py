import pytest

from steer_heal import traits
from steer_heal.records import FOUNDATIONS, UserError
from steer_heal.traits import available, load_trait


@pytest.mark.parametrize("name", available())
def test_every_trait_file_is_a_fair_pair_with_a_pool(name):
    trait = load_trait(name)
    assert trait.target in FOUNDATIONS and trait.sign in (-1, 1)
    lengths = [len(side.split()) for side in (trait.positive, trait.negative)]
    assert max(lengths) <= 1.5 * min(lengths), "poles of like length"
    assert len(trait.prompts) >= 30 and len(set(trait.prompts)) == len(trait.prompts)
    assert all(phrase == phrase.lower() for phrase in trait.narration)


def test_an_unknown_trait_names_the_known_ones():
    with pytest.raises(UserError, match="must be one of .*authority"):
        load_trait("authoritie")


@pytest.mark.parametrize("old, new, message", [
    ('target = "authority"', 'target = "power"', "target is 'power'"),
    ("sign = -1", "sign = 0", "sign is 0"),
    ("positive = ", "positiv = ", "'positive' is None"),
    ("sign = -1", "sign = [", "is not TOML"),
])
def test_a_broken_trait_file_names_the_field(tmp_path, monkeypatch, old, new, message):
    text = (traits.TRAITS / "authority.toml").read_text()
    assert old in text
    (tmp_path / "mine.toml").write_text(text.replace(old, new, 1))
    monkeypatch.setattr(traits, "TRAITS", tmp_path)
    with pytest.raises(UserError, match=message):
        load_trait("mine")
