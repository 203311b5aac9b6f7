"""Noun density (table 1) and the captioner (appendix A.4)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import transformers
from PIL import Image
from transformers import PreTrainedTokenizerFast

from common.data.folders import read_folder
from common.errors import UserError
from pixart import noun_density
from pixart.captioner import PROMPT, Captioner, caption_folder
from pixart.noun_density import NounDensity, nouns, read_captions, table
from tests.word_tokenizer import word_tokenizer

# Tagged by hand, in the styles of captions people use; none is from the tagger's training text.
TAGGED = {
    "The image shows a woman wearing a yellow dress, standing in front of a window and smiling at the camera.": (
        "image woman dress front window camera"
    ),
    "a red circle left of a blue square on a dark background": "circle square background",
    "watercolor painting of a lighthouse at sunset": "watercolor painting lighthouse sunset",
    "two children are playing football on the beach": "children football beach",
    "a photo of a black cat that sleeps on an old couch": "photo cat couch",
    "an empty street in Paris after the rain": "street paris rain",
    "John's dog runs quickly through the green grass": "john dog grass",
    "they are very happy because it is big and round": "",
    "close-up of a steaming cup of coffee on a wooden table": "close-up cup coffee table",
    "a man is reading a book and his friends laugh": "man book friends",
}


def test_tagger_finds_the_nouns_of_captions() -> None:
    found = {(c, n) for c in TAGGED for n in nouns(c)}
    truth = {(c, n) for c, words in TAGGED.items() for n in words.split()}
    precision, recall = len(found & truth) / len(found), len(found & truth) / len(truth)
    assert precision >= 0.9 and recall >= 0.9, (sorted(found ^ truth), precision, recall)


def test_tagger_reads_context() -> None:
    assert nouns("he will paint the wall") == ["wall"]
    assert nouns("the paint on the wall") == ["paint", "wall"]


def test_density_counts_valid_distinct_and_total_nouns() -> None:
    captions = ["a cat on a table"] * 11 + ["a dog"] * 10 + ["it is very big"]
    assert noun_density.noun_density(captions) == NounDensity(22, 2, 3, 32)
    row = noun_density.noun_density(captions)
    assert row.valid_share == 2 / 3 and row.nouns_per_caption == 32 / 22
    assert "2/3" in table({"mine": row}) and "66.7%" in table({"mine": row})
    assert noun_density.noun_density([]) == NounDensity(0, 0, 0, 0)


def test_captions_are_read_from_three_kinds_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat\n\na dog\n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "a cat"}\n\n{"text": "a dog"}\n')
    (tmp_path / "a.csv").write_text('id,text\n1,a cat\n2,"a dog"\n3,\n')
    for name in ("a.txt", "metadata.jsonl", "a.csv"):
        assert list(read_captions(tmp_path / name)) == ["a cat", "a dog"]
    (tmp_path / "a.txt").write_text("\ufeffa cat\u2028on a mat\n", encoding="utf-8")
    (tmp_path / "metadata.jsonl").write_text('\ufeff{"text": "a cat\u2028on a mat"}\n', encoding="utf-8")
    (tmp_path / "a.csv").write_text("\ufefftext,id\na cat\u2028on a mat,1\n", encoding="utf-8")
    for name in ("a.txt", "metadata.jsonl", "a.csv"):
        assert list(read_captions(tmp_path / name)) == ["a cat\u2028on a mat"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}\n', 'a.jsonl line 2: "text" is missing'),
        ("a.jsonl", "nonsense\n", "a.jsonl line 1: not JSON"),
        ("a.csv", "id,url\n1,a\n", "no caption column was found; its columns are id, url; name one with --text_column"),
        ("a.parquet", "", "not a whole parquet file"),
        ("a.xml", "", "are read from"),
    ],
)
def test_bad_caption_files_are_refused_by_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        list(read_captions(tmp_path / name))
    with pytest.raises(UserError, match="no such file"):
        list(read_captions(tmp_path / "absent.txt"))


def test_command_prints_the_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("a cat and a dog\n")
    noun_density.main([str(tmp_path / "a.txt")])
    assert "0/2" in capsys.readouterr().out
    noun_density.main([str(tmp_path / "a.txt"), "--json"])
    assert json.loads(capsys.readouterr().out)["nouns_per_caption"] == 2
    with pytest.raises(UserError, match="at least one caption file"):
        noun_density.main([])


def test_dense_shapes_captions_hold_more_nouns_than_web_like_ones() -> None:
    dense, web = (noun_density.noun_density(noun_density.captions_of(f"shapes:{s}", 60)) for s in ("dense", "web"))
    assert dense.nouns_per_caption > 1.5 * web.nouns_per_caption


SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
PICTURES: dict[str, Any] = {"image_size": 16, "patch_size": 8}


def _tokenizer(words: str, **special: Any) -> PreTrainedTokenizerFast:
    known = f"<pad> <s> </s> <image> [UNK] {words}"
    return word_tokenizer(known, by_spaces=True, pad_token="<pad>", bos_token="<s>", eos_token="</s>", **special)


@pytest.fixture(scope="module")
def vision_encoder_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained captioner of the vision-encoder-decoder family."""
    folder = tmp_path_factory.mktemp("captioner")
    torch.manual_seed(0)
    _tokenizer("a red cat").save_pretrained(folder)
    vision = transformers.ViTConfig(num_hidden_layers=1, **SMALL, **PICTURES)
    sizes = {"vocab_size": 8, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    decoder = {"add_cross_attention": True, "is_decoder": True, "initializer_range": 1.0}
    text = transformers.GPT2Config(**sizes, **decoder, bos_token_id=1, eos_token_id=2)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    transformers.VisionEncoderDecoderModel(config).save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained LLaVA: a chat model that is asked the paper's question."""
    folder = tmp_path_factory.mktemp("llava")
    torch.manual_seed(0)
    tokenizer = _tokenizer(f"USER: ASSISTANT: {PROMPT}", additional_special_tokens=["<image>"])
    transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=(
            "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
            "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %} ASSISTANT:"
        ),
    ).save_pretrained(folder)
    vision = transformers.CLIPVisionConfig(num_hidden_layers=2, projection_dim=16, **SMALL, **PICTURES)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = transformers.LlamaConfig(
        vocab_size=len(tokenizer), num_hidden_layers=1, num_key_value_heads=2, **SMALL, **special
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for number, name in enumerate(["a.png", "b.png", "deep/c.png"]):
        Image.new("RGB", (20 + number, 30), (80 * number, 10, 200)).save(folder / name)
    return folder


def test_every_image_gets_a_line_that_the_data_loader_reads(vision_encoder_decoder: Path, photos: Path) -> None:
    captioner = Captioner(vision_encoder_decoder, max_new_tokens=4)
    assert caption_folder(captioner, photos, batch_size=2, progress=False) == 3
    records = read_folder(photos).records
    assert [record.path.name for record in records] == ["a.png", "b.png", "c.png"]
    assert records[0].caption == captioner([Image.open(photos / "a.png")])[0]


def test_stopped_run_goes_on_after_the_last_whole_line(vision_encoder_decoder: Path, photos: Path) -> None:
    captioner = Captioner(vision_encoder_decoder, max_new_tokens=4)
    caption_folder(captioner, photos, progress=False)
    output = photos / "metadata.jsonl"
    whole = output.read_bytes()
    first = whole.index(b"\n") + 1
    output.write_bytes(whole[: first + 9])  # the second line was being written when the power went
    assert caption_folder(captioner, photos, progress=False) == 2
    assert output.read_bytes() == whole
    assert caption_folder(captioner, photos, progress=False) == 0


def test_other_model_or_prompt_does_not_continue_a_file(vision_encoder_decoder: Path, photos: Path) -> None:
    caption_folder(Captioner(vision_encoder_decoder, max_new_tokens=4), photos, progress=False)
    with pytest.raises(UserError, match="give another --output"):
        caption_folder(Captioner(vision_encoder_decoder, "Name it", max_new_tokens=4), photos, progress=False)


def test_metadata_written_by_a_person_is_never_touched(vision_encoder_decoder: Path, photos: Path) -> None:
    (photos / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "mine"}\n')
    with pytest.raises(UserError, match="begun by something else"):
        caption_folder(Captioner(vision_encoder_decoder, max_new_tokens=4), photos, progress=False)
    assert "mine" in (photos / "metadata.jsonl").read_text()


def test_broken_image_is_named_and_left_out(vision_encoder_decoder: Path, photos: Path) -> None:
    (photos / "b.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"1 images cannot be read .* b\.png"):
        assert caption_folder(Captioner(vision_encoder_decoder, max_new_tokens=4), photos, progress=False) == 2


def test_chat_model_is_asked_the_papers_question_and_only_its_answer_is_kept(llava: Path) -> None:
    captioner = Captioner(llava, max_new_tokens=3)
    images = [Image.new("RGB", (20, 30), "red"), Image.new("RGB", (30, 20), "blue")]
    inputs = captioner._inputs(images)
    asked = captioner._tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)
    assert asked == f"USER: {PROMPT} ASSISTANT:"
    assert inputs["pixel_values"].shape == (2, 3, 16, 16)
    answers = captioner(images)
    assert len(answers) == 2 and all(len(answer.split()) <= 3 for answer in answers)


def test_unusable_model_folders_are_refused(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json is missing"):
        Captioner(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}))
    (tmp_path / "code.py").write_text("raise SystemExit('the code of a model was run')")
    with pytest.raises(UserError, match="auto_map asks to run Python code"):
        Captioner(tmp_path)


def test_what_gets_no_caption_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("1.png", "._1.png", "2\udcff.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "3.heic").write_bytes(b"")
    captioner = MagicMock(return_value=["a\u2028b"], path=tmp_path / "model", prompt="", max_new_tokens=1)
    assert caption_folder(captioner, tmp_path, progress=False) == 1
    assert capsys.readouterr().err.endswith("1 pictures; 2 files passed over: '2\\udcff.png', '3.heic'\n")
    assert read_folder(tmp_path).label(0) == ("a\u2028b", -1)
