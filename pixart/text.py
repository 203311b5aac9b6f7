"""Text of PixArt-alpha: caption cleaning, aspect flags in prompts, token features with their mask.

Shape suffixes: B texts, L caption tokens, C features of a token.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote_plus

import torch
from torch import Tensor

import common.data.text as text_data
from common.data.cache import fingerprint_strings
from common.errors import UserError
from pixart.buckets import Bucket, bucket_table, nearest_bucket

# More than any encoder reads. The rules below try runs of characters from each of their places, time squared.
MOST_CHARACTERS, LONGEST_WORD = 4000, 400
_LONG_WORD = re.compile(rf"(\S{{{LONGEST_WORD}}})\S+")

_FILE_TYPES = "(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
_DOMAINS = "(?:com|co|ru|net|org|edu|gov|it)"


def _address(scheme: str) -> str:
    return rf"\b(?:{scheme}:(?:/{{1,3}}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.]{_DOMAINS}[\w/-]*\b/?(?!@))"


# The cleaning that PixArt's text encoder inherited from DeepFloyd IF, in order: (what is replaced, by what).
_ADDRESSES = [(re.compile(_address(scheme)), "") for scheme in ("https?", "www")]
_SYMBOLS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"@\w+\b", ""),  # nicknames
        ("[\u31c0-\u9fff]+", ""),  # CJK strokes, phonetic extensions, enclosed letters, ideographs, hexagrams
        (
            "[\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
            "\ufe31\ufe32\ufe58\ufe63\uff0d]+",
            "-",
        ),  # every kind of dash
        ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
        ("[\u2018\u2019]", "'"),
        (r"&quot;?", ""),
        (r"&amp", ""),
        (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # IP addresses
        (r"\d:\d\d\s+$", ""),  # article numbers
        (r"\\n", " "),  # a line break written as two characters
        (r"#\d{1,3}\b", ""),
        (r"#\d{5,}\b", ""),
        (r"\b\d{6,}\b", ""),
        (rf"\S+\.{_FILE_TYPES}", ""),  # file names
        (r"[\"']{2,}", '"'),
        (r"\.{2,}", " "),
        (r"[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~()\[\]{}|\\/*]+", " "),
        (r"\s+\.\s+", " "),
    )
]
_CODES_AND_ADVERTISING = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
        (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
        (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
        (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
        (r"(?:free\s)?download(?:\sfree)?", ""),
        (r"\bclick\b\s(?:for|on)\s\w+", ""),
        (rf"\b{_FILE_TYPES}(?:\simages?)?", ""),
        (r"\bpage\s+\d+\b", ""),
        (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
        ("\\b\\d+\\.?\\d*[x\u0445\u00d7]\\d+\\.?\\d*\\b", ""),  # 1920x1080, also with the Cyrillic letter or the sign
        (r"\b\s+:\s+", ": "),
        (r"(\D[,./])\b", r"\1 "),
        (r"\s+", " "),
        (r"^[\"']([\w\W]+)[\"']$", r"\1"),
        (r"^['_,\-:;]", ""),
        (r"['_,\-:+]$", ""),
        (r"^\.\S+$", ""),
    )
]
_WORD_JOINERS = re.compile("[-_]")
_LIGATURES = {
    ord(c): unicodedata.normalize("NFKC", c) for c in "\u0132\u0133\ufb00\ufb01\ufb02\ufb03\ufb04\ufb05\ufb06"
}
_FULL_WIDTH = {c: unicodedata.normalize("NFKC", chr(c)) for c in (*range(0xFF01, 0xFFF0), 0x3000)}
_QUOTES = {ord(c): "'" for c in "\u02bc\u2018\u2019\u201a\u201b"} | {ord(c): '"' for c in "\u201c\u201d\u201e\u201f"}
_LINE_BREAKS = re.compile("\r\n|[\r\u2028\u2029\u0085]")
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]|\x1b\\[[0-9;]*[a-zA-Z]")


def clean_caption(text: str) -> str:
    """The caption as the text encoder sees it: lower case, without markup, addresses, codes and advertising.

    The authors apply their cleaning twice; so does this. Their two helper libraries (HTML to text, repair of broken
    Unicode) are replaced by the standard library's parser and `repair_unicode`. Only the first MOST_CHARACTERS of a
    caption count, and the first LONGEST_WORD of a word.
    """
    return _clean_once(_clean_once(text))


def _clean_once(text: str) -> str:
    text = _LONG_WORD.sub(r"\1", unquote_plus(str(text)[:MOST_CHARACTERS]))
    text = text.strip().lower().replace("<person>", "person")
    text = _replace(text, _ADDRESSES)
    text = _replace(_visible_text(text), _SYMBOLS)
    if len(_WORD_JOINERS.findall(text)) > 3:  # this-is-my-cute-cat
        text = _WORD_JOINERS.sub(" ", text)
    text = html.unescape(html.unescape(repair_unicode(text))).strip()
    return _replace(text, _CODES_AND_ADVERTISING).strip()


def _replace(text: str, rules: Sequence[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


class _VisibleText(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in ("script", "style", "template")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style", "template"):
            self.hidden = max(0, self.hidden - 1)

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def _visible_text(markup: str) -> str:
    # No tag ends after the last ">": the parser would look for an end from each "<" to the end of the text.
    whole, end, rest = markup.rpartition(">")
    parser = _VisibleText()
    parser.feed(whole + end)
    parser.close()
    return "".join(parser.parts) + ("" if parser.hidden else html.unescape(rest))


def repair_unicode(text: str) -> str:
    """Straighten quotes, split ligatures, narrow full-width forms, drop control codes, compose accents.

    The authors' helper library also undoes UTF-8 that was read as Windows-1252; not here, since the text is in lower
    case and without signs by now, where that repair finds nothing.
    """
    if "<" not in text:
        text = html.unescape(text)
    text = text.translate(_LIGATURES).translate(_FULL_WIDTH).translate(_QUOTES)
    text = _CONTROL.sub("", _LINE_BREAKS.sub("\n", text))
    return unicodedata.normalize("NFC", text)


@dataclass(frozen=True)
class ParsedPrompt:
    """A prompt and the image size its flags ask for.

    text: the prompt up to its first flag.
    height, width: the size asked for in pixels: that of `--hw`, else of the ratio's bucket.
    ratio: key of the bucket nearest to `--aspect_ratio` or `--ar` (1.0 without them).
    bucket: the training size nearest in shape to height x width: sample there, then scale and crop.
    """

    text: str
    height: int
    width: int
    ratio: float
    bucket: Bucket


def parse_prompt(prompt: str, base: int = 1024, multiple: int | None = None) -> ParsedPrompt:
    """Read `--ar h:w`, `--aspect_ratio h:w` and `--hw h:w` (pixels) off the end of a prompt; all give HEIGHT first.

    Args:
        base, multiple: of the bucket table (`pixart.buckets.bucket_table`, the sizes for inference).

    Raises:
        UserError: a flag without two positive numbers h:w.
    """
    text = re.split(r"--(?:aspect_ratio|ar|hw)", prompt, maxsplit=1)[0]
    pairs = {flag: _pair(prompt, flag) for flag in ("aspect_ratio", "ar", "hw")}
    table = bucket_table(base, multiple, inference=True)
    shape = pairs["aspect_ratio"] or pairs["ar"] or (1, 1)
    by_ratio = table[nearest_bucket(table, *shape)]
    height, width = pairs["hw"] or (by_ratio.height, by_ratio.width)
    bucket = table[nearest_bucket(table, height, width)] if pairs["hw"] else by_ratio
    return ParsedPrompt(text, height, width, by_ratio.ratio, bucket)


def _pair(prompt: str, flag: str) -> tuple[int, int] | None:
    if f"--{flag}" not in prompt:
        return None
    found = re.search(rf"--{flag}\s+(\d+):(\d+)", prompt)
    if found is None or min(int(found[1]), int(found[2])) < 1:
        raise UserError(
            f"prompt {prompt!r}: --{flag} needs height:width in positive whole numbers, such as --{flag} 3:4"
        )
    return int(found[1]), int(found[2])


class TextEncoder:
    """Frozen token features of cleaned captions, right-padded to a fixed number of tokens.

    Args:
        path: a transformers encoder directory (T5 at full scale); default the packaged MiniLM, 384 features.
        length: L; longer captions are cut (with one warning).
        device, dtype: where and in what precision the encoder runs.
        batch_size: texts per forward pass.
        clean: apply `clean_caption`; else captions are only lower-cased and stripped.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        length: int = 120,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 64,
        clean: bool = True,
    ) -> None:
        if length < 1:
            raise UserError(f"the number of caption tokens must be positive, got {length}")
        self._encoder = text_data.TextEncoder(path, device=device, dtype=dtype, batch_size=batch_size)
        self.length = length
        self.clean = clean
        self._said = False

    @property
    def path(self) -> Path:
        """The transformers directory."""
        return self._encoder.path

    @property
    def channels(self) -> int:
        """C, the features of a token (the network's `caption_channels`)."""
        return self._encoder.width

    @property
    def fingerprint(self) -> str:
        """What the features depend on: encoder and tokenizer files, L, cleaning, precision."""
        options = (self._encoder.fingerprint, str(self.length), str(self.clean), str(self._encoder.dtype), "pad=last")
        return fingerprint_strings(options)

    def _cleaned(self, texts: Sequence[str]) -> list[str]:
        return [clean_caption(text) if self.clean else text.lower().strip() for text in texts]

    def say_lost(self, texts: Sequence[str]) -> None:
        """Warn, once, of texts that the cleaning leaves nothing of: those in Chinese characters, for example."""
        lost = [i for i, cleaned in enumerate(self._cleaned(texts)) if texts[i].strip() and not cleaned]
        self._said = self._said or bool(lost)
        text_data.say_lost("captions", texts, lost, "cleaned to nothing, as if they were empty")

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """features_BLC float32 and mask_BL bool (True = real token), on the CPU.

        Positions behind the last token repeat its features with mask 0, as in the authors' cached captions; a caption
        with no token at all keeps one zero token, so that attention always has something to look at.
        """
        if not self._said:
            self.say_lost(texts)
        cleaned = self._cleaned(texts)
        features_BLC, mask_BL = self._encoder.encode(cleaned, self.length)
        return fit_length(features_BLC.float(), mask_BL, self.length)


def fit_length(features_BLC: Tensor, mask_BL: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Right-padded features cut or padded to `length` tokens: padding repeats the last real token with mask 0."""
    mask_BL = mask_BL.bool()
    counts_B = mask_BL.sum(1)
    if not torch.equal(mask_BL, torch.arange(mask_BL.shape[1], device=mask_BL.device) < counts_B[:, None]):
        raise ValueError("captions must be right-padded: every real token before the first padded one")
    counts_B = counts_B.clamp(1, length)
    position_BL = torch.arange(length, device=mask_BL.device).expand(len(mask_BL), length)
    source_BL1 = torch.minimum(position_BL, counts_B[:, None] - 1)[..., None]
    fitted_BLC = features_BLC.gather(1, source_BL1.expand(-1, -1, features_BLC.shape[2]))
    return fitted_BLC, position_BL < counts_B[:, None]
