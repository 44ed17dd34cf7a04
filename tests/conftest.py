"""Tiny subject models that every test may use: random weights, real checkpoints, real tokenizers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
from tiny_study import Ran, cli, journal, tree, write_recipe, write_texts

# No deadline: on a machine that does other work too, the clock says nothing about the program.
# The examples are the same each time, so that a change is judged by what it changed, and a new user's `make test` by
# what the program does. FUZZ=50 tries fifty times as many, new ones each time (`make fuzz`).
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
FUZZ = int(os.environ.get("FUZZ", "0"))
hypothesis.settings.register_profile("fuzz", deadline=None, max_examples=100 * max(1, FUZZ))
hypothesis.settings.load_profile("fuzz" if FUZZ else "same")

LINES = [
    "def add(a, b):\n    return a + b\n",
    "for name, value in sorted(items.items()):\n    print(name, value)\n",
    "class Point:\n    def __init__(self, x, y):\n        self.x, self.y = x, y\n",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.\n",
    "Features that come back when the dictionary is trained again are shared features.\n",
    "import math\n\nprint(math.sqrt(2), 'naïve café', \"日本語\", 3.14159)\n",
    "while not done:\n    done = step(state)\n    state['count'] += 1\n",
    "One, two, three; four? Five! (six) [seven] {eight}\n",
]


LONG = (
    "test_sweep.py",
    "test_llm_kills.py",
    "test_sampling.py",
    "test_architectures_training.py",
    "test_docs.py",
    "test_vllm_option.py",
    "test_export_tables.py",
    "test_distributed.py",
    "test_step_memory.py",
    "test_matching.py",
)
"""Files that take longest: begun first, so that none of them is left to one process at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session", autouse=True)
def _room_on_disk() -> Iterator[None]:
    """How much of a cache is kept depends on how full the disk is; what a test expects must not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1 << 40, used=0, free=1 << 40))
        yield


@pytest.fixture(scope="session")
def lines() -> list[str]:
    """A few lines of code and prose, some with characters outside ASCII."""
    return LINES


@pytest.fixture(scope="session")
def tiny_neox_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-NeoX checkpoint folder: 3 layers, D 16, byte-level BPE of 320 tokens that adds no BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    bpe: Any = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        LINES,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end, bos_token=end, model_max_length=64)
    config = GPTNeoXConfig(
        vocab_size=320,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _save(GPTNeoXForCausalLM, config, tokenizer, tmp_path_factory.mktemp("neox") / "tiny-neox")


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama checkpoint folder: 2 layers, D 16, a byte-fallback BPE whose tokenizer puts ``<s>`` in front."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    bpe: Any = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    bpe.train_from_iterator(
        [line for text in LINES for line in text.splitlines() if line.isascii()],
        trainers.BpeTrainer(vocab_size=400, special_tokens=special + bytes_, show_progress=False),
    )
    # Byte tokens must be plain vocabulary for the fallback, not special ones: the model is built again without.
    import json

    state = json.loads(bpe.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in special]
    bpe = Tokenizer.from_str(json.dumps(state))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _save(LlamaForCausalLM, config, tokenizer, tmp_path_factory.mktemp("llama") / "tiny-llama")


def _save(model_class: Any, config: Any, tokenizer: Any, folder: Path) -> Path:
    import torch

    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    """A recipe for a study in seconds: see ``tiny_study``."""
    folder = tmp_path_factory.mktemp("recipe")
    return write_recipe(folder / "tiny.toml", tiny_llama_dir, write_texts(folder / "texts"))


@pytest.fixture
def short(tiny_recipe: Path, tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A recipe of 16 steps with states every 4."""
    texts = tiny_recipe.parent / "texts"
    return write_recipe(tmp_path / "short.toml", tiny_llama_dir, texts, tokens=4096, checkpoint_steps=4)


@pytest.fixture(scope="session")
def tiny_done(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> tuple[Path, dict[str, Ran]]:
    """A study of two seeds with every stage done through the commands, and what each said. To read, not to change."""
    root = tmp_path_factory.mktemp("study") / "runs"
    steps: dict[str, Sequence[object]] = {
        "train": ("--name", "run", "--seeds", 0, 1, "--no-controls", "--recipe", tiny_recipe),
        "harvest": (),
        "align": ("run_a", "run_b"),
        "explain": ("--sae", "run_a", "--unshared-only", "--definition", "lenient", "--latents", 6),
        "score": (),
        "report": (),
        "show": ("--latent", 3),
        "runs": (),
    }
    return root, {name: cli(name, *arguments, "--root", root, "--json") for name, arguments in steps.items()}


@pytest.fixture
def tiny_root(tiny_done: tuple[Path, dict[str, Ran]], tmp_path: Path) -> Path:
    """A copy of the finished study, to do with as one likes."""
    return Path(shutil.copytree(tiny_done[0], tmp_path / "runs"))


# --- the same under short names, for tests of the commands ---------------------------------------------------


@pytest.fixture
def recipe(tiny_recipe: Path) -> Path:
    return tiny_recipe


@pytest.fixture
def root(tiny_root: Path) -> Path:
    return tiny_root


@pytest.fixture
def untouched(tiny_done: tuple[Path, dict[str, Ran]]) -> Iterator[Path]:
    """The finished study itself, checked to be as it was afterwards."""
    root = tiny_done[0]
    before, rows = tree(root), journal(root / "run_a" / "journal.sqlite", times=True)
    yield root
    assert tree(root) == before
    assert journal(root / "run_a" / "journal.sqlite", times=True) == rows
