"""Train the small causal language model that reads captions here, in place of AMD-OLMo-1B.

    python instella_t2i/language_model.py --out CAPTIONS                              # some minutes on one core
    python instella_t2i/language_model.py --captions CAPTIONS.txt --out my-captions     # one caption a line

The architecture is OLMo's, the tokenizer byte-level BPE in lower case, both learned from captions alone: training
captions of the emoji and of Shapes, unless there is a file. It writes a transformers folder for --text.encoder.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.cli import Parser
from common.errors import UserError, run_main
from common.options import Count, Seed

BEGIN, END, PAD = "<s>", "</s>", "<pad>"
LONGEST = 128  # tokens
HELD_OUT = 20  # one caption in so many is not trained on
LEARNING_RATE, BATCH = 2e-3, 64
DEFAULT = "training captions of the emoji and of Shapes (sparse, dense and canonical), see common/README.md"


def default_captions() -> list[str]:
    """Of the training pictures of emoji, and of scenes in three wordings."""
    from common.data.emoji import EmojiCap
    from common.data.shapes import Shapes

    found = list(EmojiCap("train", size=64).captions)
    for style in ("sparse", "dense", "canonical"):
        found += Shapes("train", 6000, 32, caption=style).captions  # type: ignore[arg-type]
    return found


def learn_tokenizer(captions: Sequence[str], entries: int) -> Any:
    """Byte-level BPE: no text is unknown to it. A prompt begins with <s>, so that the empty one has a token too."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=[PAD, BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD, model_max_length=LONGEST
    )


def train(
    captions: Sequence[str], layers: int, width: int, entries: int, steps: int, seed: int
) -> tuple[Any, Any, float]:
    """(model, tokenizer, held-out cross-entropy of a token in nats)."""
    import torch
    import torch.nn.functional as F
    from transformers import OlmoConfig, OlmoForCausalLM

    from common.data.sampling import step_generator
    from common.errors import stop_if_not_finite

    distinct = list(dict.fromkeys(caption for caption in captions if caption.strip()))
    held_out, kept = distinct[::HELD_OUT], [c for i, c in enumerate(distinct) if i % HELD_OUT]
    if not kept:
        raise UserError(f"{len(distinct)} different captions are too few; expected at least 2")
    tokenizer = learn_tokenizer(kept, entries)
    torch.manual_seed(seed)
    config = OlmoConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = OlmoForCausalLM(config)

    def loss_of(texts: Sequence[str]) -> torch.Tensor:
        rows = [[*row[: LONGEST - 1], tokenizer.eos_token_id] for row in tokenizer(list(texts))["input_ids"]]
        longest = max(map(len, rows))
        ids_BL = torch.tensor([[*row, *[tokenizer.pad_token_id] * (longest - len(row))] for row in rows])
        logits = model(input_ids=ids_BL, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), ids_BL[:, 1:].flatten(), ignore_index=tokenizer.pad_token_id)

    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps + 1)
    for step in range(steps):
        rows = torch.randint(len(kept), (BATCH,), generator=step_generator(seed, step)).tolist()
        loss = loss_of([kept[i] for i in rows])
        stop_if_not_finite(float(loss.detach()), step)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        held = float(loss_of(held_out[:1000]))
    return model, tokenizer, held


def card(name: str, source: str, parameters: int, options: argparse.Namespace, held: float) -> str:
    """README.md of the folder."""
    from common.ledger import commit
    from common.publishing import About, facts_table, model_card

    held_out = f"one different caption in {HELD_OUT}"
    made_with = commit()
    about = About(
        name,
        "text-generation",
        "transformers",
        data=source,
        seeds=[options.seed],
        commit=made_with,
        measured={"cross_entropy": held},
        judge="nats a token",
        held_out=held_out,
    )
    facts = {
        "data": f"{source}; {held_out} held out",
        "architecture": f"OLMo, {options.layers} layers, {options.width} wide, {parameters:,} parameters, float16",
        "tokenizer": f"byte-level BPE in lower case, {options.entries} entries and {LONGEST} tokens at most, first "
        f"{BEGIN}",
        "training": f"{options.steps} steps of {BATCH} captions, AdamW, one cycle up to {LEARNING_RATE}, seed "
        f"{options.seed}",
        "held-out cross-entropy": f"{held:.3f} nats a token",
        "commit": made_with,
    }
    return model_card(
        about,
        "A causal language model of captions, trained from scratch by `instella_t2i/language_model.py`. Generators "
        "read the features of its layers; it stands in for AMD-OLMo-1B and is good for nothing else.",
        facts_table(facts),
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--captions", type=Path, help="text file, one caption a line")
    parser.add_argument("--layers", type=Count, default=4, help="of the network: as many as the stream has blocks")
    parser.add_argument("--width", type=Count, default=128, help="of the network, in multiples of 32")
    parser.add_argument("--entries", type=Count, default=2048, help="of the vocabulary, at least 300")
    parser.add_argument("--steps", type=Count, default=1500, help="of training, 64 captions each")
    parser.add_argument("--seed", type=Seed, default=0, help="of the weights and of the order")
    options = parser.parse_args(argv)
    if options.out.exists():
        raise UserError(f"--out {options.out} exists; choose another name")
    if options.width % 32:
        raise UserError(f"--width {options.width}: expected a multiple of 32, the width of a head")
    if options.entries < 300:
        raise UserError(f"--entries {options.entries}: expected at least 300; the bytes alone take 256")

    import torch

    from common.data.pairs import read_prompts
    from common.files import replace_folder

    captions = read_prompts(options.captions) if options.captions else default_captions()
    model, tokenizer, held = train(
        captions, options.layers, options.width, options.entries, options.steps, options.seed
    )

    parameters = sum(p.numel() for p in model.parameters())
    source = f"the lines of {options.captions.name}" if options.captions else DEFAULT
    text = card(options.out.name, source, parameters, options, held)

    def write(place: Path) -> None:
        model.to(torch.float16).save_pretrained(place)
        tokenizer.save_pretrained(place)
        (place / "README.md").write_text(text, encoding="utf-8")

    replace_folder(options.out, write)
    print(f"{options.out}: {parameters:,} parameters, {held:.3f} nats a token on held-out captions")
    return {"parameters": parameters, "held_out_nats": held}


if __name__ == "__main__":
    run_main(main)
