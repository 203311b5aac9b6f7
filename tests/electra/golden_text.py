"""Checks of the recorded tokenizer and example builder."""

from __future__ import annotations

import random

import torch

from electra.examples import ExampleBuilder, row_of
from electra.wordpiece import Tokenizer
from tests.golden_case import Case, Check


def check_tokenizer(case: Case) -> None:
    tokenizer = Tokenizer(case.config["vocab"])
    sentences = case.config["sentences"]
    for index, sentence in enumerate(sentences):
        if "tokens" in case.config:
            assert tokenizer.pieces(sentence) == case.config["tokens"][index], sentence
        expected = case.tensors[f"out/ids{index}"].int().tolist()
        assert tokenizer.ids(sentence) == expected, sentence
    assert tokenizer.ids_of_many(sentences) == [tokenizer.ids(sentence) for sentence in sentences]


def check_example_builder(case: Case) -> None:
    tokenizer = Tokenizer(case.config["vocab"])
    builder = ExampleBuilder(case.config["max_length"], random.Random(case.config["python_random_seed"]))
    examples = []
    for line in case.config["lines"]:
        examples += builder.add(tokenizer.ids(line)) if line.strip() else builder.finish()
    examples += builder.finish()
    out = {name: values.long() for name, values in case.group("out").items()}
    made = {name: torch.zeros_like(values) for name, values in out.items()}
    assert len(examples) == len(out["input_ids"])
    for index, example in enumerate(examples):
        row, first_length = row_of(example, tokenizer.cls_id, tokenizer.sep_id)
        made["input_ids"][index, : len(row)] = torch.tensor(row)
        made["input_mask"][index, : len(row)] = 1
        made["segment_ids"][index, first_length : len(row)] = 1
    for name, expected in out.items():
        assert torch.equal(made[name], expected), name


CHECKS = [
    Check("tokenizer", lambda case: "FullTokenizer" in case.source, check_tokenizer),
    Check("example builder", lambda case: "ExampleBuilder" in case.source, check_example_builder),
]
