"""Presets are the published models: their parameter counts say so."""

from __future__ import annotations

import pytest

from megallm.config.presets import get_preset, preset_names
from megallm.model.counts import parameter_counts

# Sum of the tensors in the Hugging Face repository of each model.
EXACT = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "mistral-7b": 7_241_732_096,
    "tiny": 4_999_424,
    # 65 and 64 rows of 128, 4 layers of 12 x 128^2 and two norms, a last norm; nanoGPT prints 0.80M.
    "nanogpt-char": 65 * 128 + 64 * 128 + 4 * (12 * 128**2 + 2 * 256) + 256,
}


@pytest.mark.parametrize("name", EXACT)
def test_parameter_count_is_the_published_one(name: str) -> None:
    assert parameter_counts(get_preset(name)).total == EXACT[name]


@pytest.mark.parametrize("name", [name for name in preset_names() if name not in EXACT])
def test_parameter_count_rounds_to_the_name(name: str) -> None:
    """GPT-3's table rounds 356 M to 350 M and 12.85 B to 13 B; SC21's table gives one decimal."""
    size = name.split("-")[1]
    billions = float(size[:-1]) / (1000 if size.endswith("m") else 1)
    total = parameter_counts(get_preset(name)).total / 1e9
    if name.startswith("sc21-"):
        assert abs(total - billions) <= 0.051
    else:
        assert total == pytest.approx(billions, rel=0.02)


def test_no_preset_is_left_untested() -> None:
    rounded = {name for name in preset_names() if name.startswith(("sc21-", "gpt3-"))}
    assert set(EXACT) | rounded == set(preset_names())
    assert len([name for name in rounded if name.startswith("sc21-")]) == 10


def test_unknown_preset_gets_a_suggestion_and_the_list() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'gtp2': did you mean gpt2\? Presets: tiny, nanogpt-char, gp"):
        get_preset("gtp2")
    with pytest.raises(ValueError, match=r"unknown model 'zzz': it is neither a preset nor"):
        get_preset("zzz")


def test_llama3_scaling_is_only_in_the_long_ones() -> None:
    assert get_preset("llama3-8b").rope_scaling is None
    scaling = get_preset("llama3.2-1b").rope_scaling
    assert scaling is not None
    assert (scaling.rope_type, scaling.factor, scaling.original_max_position_embeddings) == ("llama3", 32.0, 8192)
