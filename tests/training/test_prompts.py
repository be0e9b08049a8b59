"""Prompts: where they come from, and their order."""

from __future__ import annotations

import datasets
import pytest

from stitchvm_ext.training import PromptDataset

TEXTS = [f"a picture of {number} rings" for number in range(7)]


def test_every_epoch_is_a_permutation_of_its_own_and_can_be_entered_anywhere():
    prompts = PromptDataset(TEXTS, seed=3)
    sequence = prompts.at(0, 21)
    epochs = [sequence[k : k + 7] for k in (0, 7, 14)]
    assert all(sorted(epoch) == sorted(TEXTS) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert prompts.at(5, 9) == sequence[5:14]
    assert PromptDataset(TEXTS, seed=4).at(0, 7) != epochs[0]


def test_a_text_file_has_one_prompt_per_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([TEXTS[0], "", f"  {TEXTS[1]}  ", "ein gr\u00fcner Ring"]), encoding="utf-8")
    assert PromptDataset(path).texts == [*TEXTS[:2], "ein gr\u00fcner Ring"]


@pytest.mark.parametrize("column", ["prompt", "text", "caption"])
def test_a_dataset_gives_its_column(column):
    dataset = datasets.Dataset.from_dict({"id": list(range(7)), column: TEXTS})
    assert PromptDataset(dataset).texts == TEXTS
    assert PromptDataset(dataset).digest == PromptDataset(TEXTS).digest != PromptDataset(TEXTS[:-1]).digest


def test_bad_prompts_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a text file with one prompt per line, found none at"):
        PromptDataset(tmp_path / "missing.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="got an empty file"):
        PromptDataset(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"gr\xfcn")
    with pytest.raises(OSError, match="expected text in UTF-8"):
        PromptDataset(tmp_path / "latin.txt")
    with pytest.raises(ValueError, match="at least one text, got an empty list"):
        PromptDataset([])
    with pytest.raises(TypeError, match="expected texts, a text file or a datasets.Dataset, got int"):
        PromptDataset(3)
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    with pytest.raises(ValueError, match=r"expected a column words, got \['text'\]"):
        PromptDataset(dataset, column="words")
    with pytest.raises(TypeError, match="got IterableDataset"):
        PromptDataset(dataset.to_iterable_dataset())
