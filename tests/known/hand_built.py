"""A subject model, a corpus and dictionaries made by hand, of which every answer is known before anything is asked.

The model is a real GPT-2 checkpoint of one block. After it the residual stream holds four one-hot vectors end to end:
the token, the position, the token before, and the token 16 places back. One attention head finds each of the last two
by position. Every text is exactly one sequence and begins with the same word, so that the far head has something
harmless to look at where there is nothing 16 places back.

A latent adds some of these coordinates and fires above a threshold, so what it fires on is known exactly:

``token``   on one word.
``bigram``  on one word right after another. Both words are common without the other, too.
``digit``   on any digit.
``noise``   on what the words 16 places back are. A context has 8 tokens, so nothing that is in it tells whether
            the latent fires, and neither does its place in the sequence.
``mixed``   on one word, or on certain words 16 places back: the words that are seen explain a part of the firings.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_study import cli

from autointerp.contexts.material import Material
from autointerp.contexts.sides import JUDGE
from sae.dictionaries.architectures.relu import ReluSae
from sae.dictionaries.checkpoint import save_sae
from sae.study.run import Run, write_record

CONTEXT, WINDOW, FAR = 64, 8, 16
DIGITS = tuple("0123456789")
WORDS = (
    *("ash", "bay", "cat", "dog", "elm", "fox", "gnu", "hen", "ivy", "jay", "kid", "lark", "moss", "newt", "oak"),
    *("pine", "quail", "reed", "sage", "toad", "urn", "vine", "wren", "yak", "zinc", "arch", "bell", "coin", "door"),
    *("edge", "flag", "gate", "hall", "iron", "jar", "key", "lamp", "mill", "nail", "oven"),
)
FIRST, END = "begin", "<end>"
VOCABULARY = (END, FIRST, *WORDS, *DIGITS)
V = len(VOCABULARY)
D = 3 * V + CONTEXT
TOKEN, POSITION, BEFORE, BACK = 0, V, V + CONTEXT, 2 * V + CONTEXT
"""where each one-hot vector begins in the D coordinates"""
FOLLOWS = {WORDS[i]: WORDS[i + 1] for i in range(0, 24, 2)}
"""the second word comes after the first half of the time"""
SEED_OF_CORPUS = 11


@dataclass(frozen=True)
class Latent:
    """What one latent fires on. ``seen`` are words that a context shows, ``back`` are words 16 places back."""

    kind: str
    seen: tuple[str, ...] = ()
    after: str | None = None
    back: tuple[str, ...] = ()

    def direction(self) -> np.ndarray:
        """[D] the encoder's row."""
        row = np.zeros(D, np.float32)
        row[[TOKEN + place(word) for word in self.seen]] = 1
        row[[BACK + place(word) for word in self.back]] = 1
        if self.after is not None:
            row[BEFORE + place(self.after)] = 1
        return row

    @property
    def bias(self) -> float:
        """Half-way between firing and not, so that rounding decides nothing."""
        return -1.5 if self.after is not None else -0.5


def latents() -> list[Latent]:
    """The dictionary from which all seeds are made: 12 token, 12 bigram, 1 digit, 12 noise and 36 mixed latents."""
    rng = random.Random(3)
    found = [Latent("token", (word,)) for word in WORDS[24:36]]
    found += [Latent("bigram", (second,), after=first) for first, second in FOLLOWS.items()]
    found.append(Latent("digit", DIGITS))
    found += [Latent("noise", back=tuple(rng.sample(WORDS, 3))) for _ in range(12)]
    # From one that the word explains nearly wholly to one that it explains hardly at all.
    found += [Latent("mixed", (WORDS[i],), back=tuple(rng.sample(WORDS, 1 + i % 6))) for i in range(36)]
    return found


def place(word: str) -> int:
    return VOCABULARY.index(word)


# --- subject and corpus -------------------------------------------------------------------------------------------


def write_model(folder: Path) -> Path:
    """The checkpoint with its tokenizer, as ``transformers`` writes them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast

    names = {word if word == END else f"Ġ{word}": i for i, word in enumerate(VOCABULARY)}
    words: Tokenizer = Tokenizer(models.WordLevel(names, unk_token=END))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # type: ignore[assignment]
    words.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END).save_pretrained(folder)
    config = GPT2Config(
        vocab_size=V, n_positions=CONTEXT, n_embd=D, n_layer=1, n_head=2, n_inner=1, bos_token_id=0, eos_token_id=0
    )
    model = GPT2Model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.wte.weight[:, TOKEN : TOKEN + V] = torch.eye(V)
        model.wpe.weight[:, POSITION : POSITION + CONTEXT] = torch.eye(CONTEXT)
        block = model.h[0]
        for norm in (block.ln_1, block.ln_2, model.ln_f):
            norm.weight.fill_(1.0)
        _set_attention(block.attn, config.layer_norm_epsilon)
    model.save_pretrained(folder)
    return folder


def _set_attention(attention: Any, epsilon: float) -> None:
    """Head 0 copies the token before, head 1 the token 16 places back; where there is none, the first token.

    An embedding is two ones among D coordinates, so that normalising it is one known scale and shift.
    """
    mean = 2 / D
    scale = (mean - mean**2 + epsilon) ** 0.5
    size = D // 2  # of a head
    weight, bias, out = attention.c_attn.weight, attention.c_attn.bias, attention.c_proj.weight
    steps = torch.arange(CONTEXT)
    for head, (back, target) in enumerate(((1, BEFORE), (FAR, BACK))):
        query, key, value = (part * D + head * size for part in range(3))
        sharp = 60 * scale**2 * size**0.5  # a match is 60 above all others before the softmax
        weight[POSITION + steps[back:], query + steps[:-back]] = sharp
        weight[POSITION + steps, key + steps] = 1.0
        # A constant query half as strong looks for the first position.
        bias[query + CONTEXT] = sharp / 2 / scale
        weight[POSITION, key + CONTEXT] = 1.0
        words = torch.arange(V)
        weight[TOKEN + words, value + words] = scale
        bias[value + words] = mean
        out[head * size + words, target + words] = 1.0


def write_corpus(path: Path, n_texts: int = 1000) -> Path:
    """Lines of JSON, each a text of exactly one sequence: words at random, some followed by their second word."""
    rng = random.Random(SEED_OF_CORPUS)
    words = [*WORDS, *DIGITS]
    weights = [1.0] * len(WORDS) + [0.35] * len(DIGITS)
    lines = []
    for _ in range(n_texts):
        text = [FIRST]
        while len(text) < CONTEXT - 1:
            second = FOLLOWS.get(text[-1])
            text.append(second if second and rng.random() < 0.5 else rng.choices(words, weights)[0])
        lines.append(json.dumps({"text": "".join(f" {word}" for word in text)}))
    path.write_text("\n".join(lines) + "\n")
    return path


# --- dictionaries -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seed:
    """One dictionary: which of the known latents stands at each place, and how far its direction was turned.

    ``origin`` [M] is the known latent at each place, or -1 for a direction of its own; ``cosine`` [M] the cosine with
    that latent's true direction, in the encoder and in the decoder.
    """

    name: str
    origin: np.ndarray
    cosine: np.ndarray


def write_sae(folder: Path, known: Sequence[Latent], seed: Seed, noise: int) -> Path:
    """A checkpoint with every latent of ``seed`` turned by its cosine towards a direction of its own."""
    rng = np.random.default_rng(noise)
    m = len(seed.origin)
    truth = np.stack([latent.direction() for latent in known])
    lengths, biases = np.linalg.norm(truth, axis=1), np.array([latent.bias for latent in known])
    known_at = seed.origin >= 0
    rows = []
    for _ in range(2):
        unit = np.where(known_at[:, None], (truth / lengths[:, None])[seed.origin], 0)
        other = rng.normal(size=(m, D))
        other -= (other * unit).sum(1, keepdims=True) * unit
        other /= np.linalg.norm(other, axis=1, keepdims=True)
        share = np.where(known_at, seed.cosine, 0)[:, None]
        rows.append(share * unit + np.sqrt(1 - share**2) * other)
    encoder, decoder = rows
    length = np.where(known_at, lengths[seed.origin], 1)[:, None]
    bias = np.where(known_at, biases[seed.origin], -0.3)
    weights = {"W_enc": encoder * length, "b_enc": bias, "W_dec": decoder, "b_dec": np.zeros(D)}
    tensors = {name: torch.tensor(values, dtype=torch.float32) for name, values in weights.items()}
    save_sae(folder, ReluSae(**tensors, k=None))
    return folder


def write_recipe(path: Path, model: Path, corpus: Path, n_contexts: int = 50) -> Path:
    """A recipe that reads ``corpus`` through ``model``; ``n_contexts`` of each kind to test on."""
    lines = [
        *("[subject]", f'model = "{model}"', 'hookpoint = "h.0"', 'dtype = "float32"'),
        *("[corpus]", 'kind = "text"', f'source = ["{corpus}"]', f"context = {CONTEXT}"),
        *("[harvest]", f"window = {WINDOW}"),
        *("[contexts]", f"n_active = {n_contexts}", f"n_inactive = {n_contexts}", "n_strata = 2"),
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def make_study(root: Path, made: Path, study: str, seeds: Sequence[Seed], recipe: Path) -> list[Run]:
    """Import the dictionaries of ``seeds`` as runs of ``study``, harvest and align them by the program's commands."""
    known = latents()
    for i, seed in enumerate(seeds):
        folder = write_sae(made / study / seed.name, known, seed, noise=i)
        source = ("--from", folder, "--name", seed.name, "--study", study, "--recipe", recipe)
        cli("import", *source, "--root", root).well()
    names = [seed.name for seed in seeds]
    cli("harvest", *(word for name in names for word in ("--sae", name)), "--root", root).well()
    if len(names) > 1:
        cli("align", *names, "--no-nulls", "--root", root).well()
    return [Run.open(name, root) for name in names]


def make_control(like: Run, kind: str, sae: ReluSae) -> Run:
    """A control SAE of the study of ``like``, with weights made by hand, harvested."""
    made = {"schema", "name", "study", "seed", "created", "imported", "settings", "settings_digest", "packages"}
    provenance = {key: value for key, value in like.record.items() if key not in made | {"git_commit"}}
    frozen = {"frozen": "decoder", "untrained": "everything"}[kind]
    settings = like.settings.with_values(training={"frozen": frozen, "num_latents": sae.num_latents})
    study = f"{like.study}-{kind}"
    run = Run(f"{study}_a", like.root)
    write_record(run, 0, study, settings, provenance)
    save_sae(run.folder, sae)
    cli("harvest", "--sae", run.name, "--root", like.root).well()
    return run


def of_what_is_not_seen(n: int) -> ReluSae:
    """``n`` latents that fire on what stands 16 places back: no explanation of a context of 8 tokens can say when."""
    rng = random.Random(5)
    known = [Latent("noise", back=tuple(rng.sample(WORDS, 3))) for _ in range(n)]
    rows = np.stack([latent.direction() for latent in known])
    return _relu_sae(rows, np.array([latent.bias for latent in known]))


def of_random_directions(n: int) -> ReluSae:
    """``n`` latents in random directions, each firing on the inputs that lie farthest along its own."""
    rng = np.random.default_rng(6)
    rows = rng.normal(size=(n, D))
    return _relu_sae(rows, np.full(n, -3.5))  # an input is four ones: its product has standard deviation 2


def _relu_sae(rows: np.ndarray, bias: np.ndarray) -> ReluSae:
    decoder = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    weights = {"W_enc": rows, "b_enc": bias, "W_dec": decoder, "b_dec": np.zeros(D)}
    return ReluSae(**{name: torch.tensor(values, dtype=torch.float32) for name, values in weights.items()}, k=None)


def rule_score(run: Run, latent: int, known: Latent) -> float:
    """The balanced accuracy of "the context shows what is seen" over every ordinary context of the judge's side."""
    store = run.store()
    sides = Material.of(run).sampler.sides
    fires = np.zeros(store.n_windows, bool)
    fires[store.windows(latent)[0]] = True
    tokens = store.tokens(np.arange(store.n_windows))
    wanted = np.asarray(np.isin(tokens, [place(word) for word in known.seen]))
    if known.after is not None:
        wanted[:, 1:] &= tokens[:, :-1] == place(known.after)
        wanted[:, 0] = False
    says, used = np.asarray(wanted.any(1)), ~store.has_special() & (sides == JUDGE)
    return float(says[used & fires].mean() + (~says[used & ~fires]).mean()) / 2
