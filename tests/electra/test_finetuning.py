from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from electra.config import ElectraConfig, FinetuneConfig
from electra.evaluate import format_table
from electra.evaluate import main as evaluate_main
from electra.finetuning import (
    FinetuneModel,
    answer_f1,
    answer_text,
    encode_items,
    evaluate,
    finetune,
    finetune_model,
    predict,
)
from electra.heads import AnswerBeams, QuestionAnsweringHead, answer_candidates, best_span
from electra.model import Encoder
from electra.optim import parameter_groups
from electra.tasks import Item, Task
from electra.wordpiece import SPECIAL_TOKENS, Tokenizer

WORDS = [f"w{i}" for i in range(20)]
TOKENIZER = Tokenizer([*SPECIAL_TOKENS, *WORDS, "good", "bad", "where", "##x"])
TINY = ElectraConfig(
    vocab_size=TOKENIZER.size,
    embedding_size=16,
    hidden_size=16,
    layers=1,
    heads=2,
    intermediate_size=32,
    max_position=32,
    init="fan_in",
)
FAST = FinetuneConfig(lr=5e-3, epochs=6, batch_size=16, max_length=24, device="cpu")


def _sentence(rng: random.Random, *extra: str) -> str:
    words = [*rng.choices(WORDS, k=rng.randrange(3, 9)), *extra]
    rng.shuffle(words)
    return " ".join(words)


def _classification(n: int = 160) -> Task:
    rng = random.Random(0)
    items = [Item(_sentence(rng, ("bad", "good")[i % 2]), label=i % 2) for i in range(n + 60)]
    return Task("toy", "classification", ("bad", "good"), items[:n], [], items[n:], "accuracy", "a word decides")


def test_a_task_that_one_word_decides_is_learned_from_scratch() -> None:
    result = finetune(TINY, TOKENIZER, _classification(), FAST)
    assert result.steps == 60
    assert not result.pretrained
    assert result.score > 90
    assert result.test["matthews"] > 80


def test_the_same_seed_gives_the_same_weights_and_leaves_the_callers_randomness_alone() -> None:
    task = _classification(64)
    short = FinetuneConfig(epochs=1, batch_size=16, device="cpu")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, _ = finetune_model(TINY, TOKENIZER, task, short, seed=1)
    assert torch.equal(torch.rand(3), expected)
    again, _ = finetune_model(TINY, TOKENIZER, task, short, seed=1)
    other, _ = finetune_model(TINY, TOKENIZER, task, short, seed=2)
    same = [torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values())]
    assert all(same)
    assert not torch.equal(first.get_parameter("head.dense.weight"), other.get_parameter("head.dense.weight"))


def test_regression_learns_an_order() -> None:
    rng = random.Random(1)
    rows = [(i % 5) / 4 for i in range(220)]
    items = [Item(_sentence(rng, *["good"] * round(4 * y)), label=y) for y in rows]
    task = Task("toy", "regression", (), items[:160], [], items[160:], "spearman", "count a word")
    assert finetune(TINY, TOKENIZER, task, FAST).score > 60


def test_tagging_reads_the_first_piece_of_every_word() -> None:
    rng = random.Random(2)
    items = []
    for _ in range(200):
        words = tuple(rng.choice([*WORDS, "goodx", "badx"]) for _ in range(6))
        items.append(Item(words=words, tags=tuple(int(word.endswith("x")) for word in words)))
    task = Task("toy", "tagging", ("O", "X"), items[:150], [], items[150:], "accuracy", "")
    row = encode_items([Item(words=("goodx", "w1"), tags=(1, 0))], task, TOKENIZER, 24)[0]
    assert row.places == [1, 3]
    assert set(row.types) == {1}  # as in the official code
    model, result = finetune_model(TINY, TOKENIZER, task, FAST)
    assert result.score > 95
    own = [Item(words=("w1", "goodx", "badx", "w2")), Item(words=("w3",) * 40), Item(words=("w1",))]
    found = predict(model, own, task, TOKENIZER, FAST)
    assert [answer_text(tags, item, task) for tags, item in zip(found, own)] == [
        "O X X O",
        " ".join(["O"] * 22 + ["?"] * 18),  # a row has 24 places, [CLS] and [SEP] among them
        "O",
    ]


def test_answers_are_found_and_their_absence_too() -> None:
    rng = random.Random(3)
    items = []
    for i in range(320):
        words = rng.choices(WORDS, k=6)
        place = rng.randrange(6)
        if i % 3:
            words[place] = "good"
        items.append(Item("where", words=tuple(words), answer=(place, place) if i % 3 else None))
    task = Task("toy", "questions", (), items[:240], [], items[240:], "f1", "")
    config = FinetuneConfig(lr=5e-3, epochs=8, batch_size=16, device="cpu")
    model, result = finetune_model(TINY, TOKENIZER, task, config)
    assert result.test["f1"] > 70
    assert result.test["answerable_accuracy"] > 70
    told = [
        answer_text(a, item, task) for a, item in zip(predict(model, task.test, task, TOKENIZER, config), task.test)
    ]
    right = sum(answer == ("" if item.answer is None else "good") for answer, item in zip(told, task.test))
    assert 100 * right / len(told) == pytest.approx(result.test["exact_match"])


def test_rows_are_cut_to_the_length_and_the_longer_of_a_pair_first() -> None:
    task = _classification(4)
    rows = encode_items([Item(" ".join(WORDS), "good bad")], task, TOKENIZER, 12)
    cls_id, sep_id = TOKENIZER.cls_id, TOKENIZER.sep_id
    assert rows[0].ids == [cls_id, *TOKENIZER.ids(" ".join(WORDS[:7])), sep_id, *TOKENIZER.ids("good bad"), sep_id]
    assert rows[0].types == [0] * 9 + [1] * 3


def test_packing_does_not_change_the_predictions_of_a_row() -> None:
    torch.manual_seed(0)
    task = _classification(40)
    model = FinetuneModel(Encoder(TINY), task).eval()
    together = predict(model, task.train, task, TOKENIZER)
    alone = [predict(model, [item], task, TOKENIZER)[0] for item in task.train]
    assert together == alone


def test_unordered_pairs_are_doubled() -> None:
    items = [Item(f"w{i}", "good", label=i % 2) for i in range(16)]
    task = Task("toy", "classification", ("a", "b"), items, [], items[:4], "accuracy", "")
    config = FinetuneConfig(epochs=1, batch_size=16, device="cpu")
    assert finetune(TINY, TOKENIZER, task, config).steps == 1
    doubled = FinetuneConfig(epochs=1, batch_size=16, double_unordered=True, device="cpu")
    assert finetune(TINY, TOKENIZER, task, doubled).steps == 2


def test_layer_wise_rates_reach_the_head_undiminished_and_the_embeddings_least() -> None:
    model = FinetuneModel(Encoder(TINY), _classification(4))
    groups = parameter_groups(model.named_parameters(), 0.0, 0.8, TINY.layers)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scale[id(model.get_parameter("head.dense.weight"))] == 1.0
    assert scale[id(model.electra.get_parameter("encoder.layer.0.output.dense.weight"))] == pytest.approx(0.8**2)
    assert scale[id(model.electra.get_parameter("embeddings.word_embeddings.weight"))] == pytest.approx(0.8**3)


def test_a_vocabulary_larger_than_the_encoder_is_refused() -> None:
    larger = Tokenizer([*TOKENIZER.vocabulary, "more"])
    with pytest.raises(UserError, match="the vocabulary has 30 pieces but the encoder knows 29"):
        finetune(TINY, larger, _classification(16), FAST)


def test_spearman_counts_ranks_only() -> None:
    task = Task("toy", "regression", (), [], [], [Item(w, label=i / 20) for i, w in enumerate(WORDS)], "spearman", "")
    model = FinetuneModel(Encoder(TINY), task).eval()
    rows = encode_items(task.test, task, TOKENIZER, 24)
    values = predict(model, task.test, task, TOKENIZER)
    from scipy.stats import spearmanr

    assert evaluate(model, rows)["spearman"] == pytest.approx(100 * spearmanr(values, range(20)).statistic)


def test_scores_of_a_constant_answer_are_zero() -> None:
    task = Task("toy", "classification", ("a", "b"), [], [], [Item("w1", label=0), Item("w1", label=1)], "matthews", "")
    model = FinetuneModel(Encoder(TINY), task).eval()
    found = evaluate(model, encode_items(task.test, task, TOKENIZER, 24))
    assert found == {"accuracy": 50.0, "matthews": 0.0}


def test_f1_of_answers_counts_common_words() -> None:
    assert answer_f1(["a", "b"], ["b", "c"]) == pytest.approx(0.5)
    assert answer_f1([], []) == 1
    assert answer_f1([], ["a"]) == 0


def test_spans_that_run_backwards_touch_cls_or_are_too_long_do_not_count() -> None:
    beams = AnswerBeams(
        start_log_probs_BK=torch.tensor([[-0.1, -1.0]]),
        starts_BK=torch.tensor([[0, 3]]),
        end_log_probs_BKK=torch.tensor([[[-0.1, -0.2], [-0.1, -0.5]]]),
        ends_BKK=torch.tensor([[[0, 5], [2, 9]]]),
        impossible_B=torch.zeros(1),
    )
    assert best_span(beams, 0, longest=30) == (3, 9)
    assert best_span(beams, 0, longest=5) is None


def test_only_the_second_segment_and_cls_may_answer() -> None:
    mask_BL = torch.tensor([[1, 1, 1, 1, 0]])
    types_BL = torch.tensor([[0, 0, 1, 1, 0]])
    candidates_BL = answer_candidates(mask_BL, types_BL)
    assert candidates_BL.tolist() == [[1, 0, 1, 1, 0]]
    beams = QuestionAnsweringHead(8).search(torch.randn(1, 5, 8), candidates_BL, beam=3)
    assert set(beams.starts_BK.flatten().tolist()) == {0, 2, 3}


def save_encoder(folder: Path) -> Path:
    """A transformers directory of random weights."""
    from electra.layouts import write_directory

    state = {f"electra.{k}": v for k, v in Encoder(TINY).state_dict().items()}
    write_directory(folder, TINY, "ElectraForPreTraining", state)
    TOKENIZER.save(folder, 64)
    return folder


def test_the_program_scores_a_saved_encoder_beside_scratch_and_labels_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_encoder(tmp_path / "encoder")
    rows = [f"{item.text}\t{('bad', 'good')[int(item.label)]}" for item in _classification(200).train]
    (tmp_path / "mine.tsv").write_text("text\tlabel\n" + "\n".join(rows) + "\n")
    options = [str(folder), "--tasks", f"file:{tmp_path}/mine.tsv", "--epochs", "8", "--lr", "0.01", "--device", "cpu"]
    evaluate_main([*options, "--seeds", "0", "--layer_decay", "1.0", "--output", str(tmp_path / "scores.json")])
    table = capsys.readouterr().out.splitlines()
    assert "from scratch" in table[0]
    assert str(folder) in table[0]
    assert (tmp_path / "scores.json").is_file()
    (tmp_path / "lines.txt").write_text("w1 good w2\nbad w3\n")
    evaluate_main([*options, "--layer_decay", "1.0", "--predict", str(tmp_path / "lines.txt")])
    assert capsys.readouterr().out == "good\tw1 good w2\nbad\tbad w3\n"
    odd = ["w1\u2028good w2", "", "bad w3\f", "good\x85"]
    (tmp_path / "lines.txt").write_bytes(("\ufeff" + "\r\n".join(odd)).encode())
    evaluate_main([*options, "--layer_decay", "1.0", "--predict", str(tmp_path / "lines.txt")])
    answers = [line.split("\t") for line in capsys.readouterr().out.removesuffix("\n").split("\n")]
    assert [line for _, line in answers] == odd
    assert [label for label, _ in answers] == ["good", "", "bad", "good"]


def test_words_and_questions_of_the_users_are_answered_line_by_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from electra.evaluate import predict_lines

    save_encoder(tmp_path / "encoder")
    monkeypatch.setattr("electra.finetuning.predict", lambda model, items, *_: [made[item] for item in items])
    made: dict[Item, object] = {
        Item(words=("w1", "goodx")): [0, 1],
        Item("where is it", words=("the", "good", "place")): (1, 2),
        Item("where", words=("bad",)): None,
    }
    items = [Item(words=("w1", "badx"), tags=(0, 1)), Item(words=("w2",), tags=(0,))]
    tagging = Task("toy", "tagging", ("O", "X"), items, [], items, "accuracy", "")
    lines = tmp_path / "lines.txt"
    lines.write_text("w1 goodx\n\n")
    quick = FinetuneConfig(epochs=1, batch_size=2, device="cpu")
    assert predict_lines(tmp_path / "encoder", tagging, quick, lines) == ["O X\tw1 goodx", "\t"]
    asked = [Item("where", words=("w1", "good"), answer=(1, 1)), Item("where", words=("w1",))]
    questions = Task("toy", "questions", (), asked, [], asked, "f1", "")
    lines.write_text("where is it\tthe good place\nwhere\tbad\n")
    assert predict_lines(tmp_path / "encoder", questions, quick, lines) == [
        "good place\twhere is it\tthe good place",
        "\twhere\tbad",
    ]
    lines.write_text("where\tbad\nwhere is it\n")
    with pytest.raises(UserError, match="line 2: expected a question, a tab, and its passage"):
        predict_lines(tmp_path / "encoder", questions, quick, lines)


def test_the_table_shows_the_median_and_the_spread() -> None:
    record = {
        "task": "t",
        "encoder": "e",
        "metric": "accuracy",
        "score": 2.0,
        "scores": [1.0, 2.0, 4.0],
        "majority": 50,
    }
    assert "2.0 [1.0, 4.0]" in format_table([record])


@pytest.mark.parametrize("kind", ["rate", "labels"])
def test_fine_tuning_that_runs_away_ends_in_a_sentence_and_not_in_a_score(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "rate":  # no option asks for such a one
        monkeypatch.setattr("electra.finetuning.learning_rate", lambda *_: 1e30)
    items = [Item(f"w{i % 9} w{i % 5}", label=float("nan") if kind == "labels" else i % 2) for i in range(64)]
    task = Task("toy", "regression", (), items[:48], [], items[48:], "spearman", "numbers")
    with pytest.raises(UserError, match=r"the fine-tuning loss became (nan|inf) at step [0-9]+: stopped\. Try a lower"):
        finetune(TINY, TOKENIZER, task, FAST)


def test_answers_that_are_not_finite_get_no_score() -> None:
    task = _classification(32)
    model, _ = finetune_model(TINY, TOKENIZER, task, FinetuneConfig(epochs=1, batch_size=16, device="cpu"))
    torch.nn.init.constant_(model.get_parameter("head.dense.weight"), float("inf"))
    with pytest.raises(UserError, match="answers are not finite"):
        evaluate(model, encode_items(task.test, task, TOKENIZER, 24))
