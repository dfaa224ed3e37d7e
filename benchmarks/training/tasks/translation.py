"""German to English on Multi30k, with a small encoder-decoder transformer."""

import collections
import gzip
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax
from training.tasks.task import (
    Batch,
    DataError,
    Numbers,
    PyTree,
    Task,
    Variables,
    warmup_cosine,
)

PAD, BOS, EOS, UNK = range(4)
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
# Words keep inner hyphens and apostrophes, as in sacrebleu's own tokenizer.
TOKEN = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")
SPLITS = {"train": "train", "validation": "val", "test": "test_2016_flickr"}
EVALUATION_BATCH = 256


class Size(NamedTuple):
    """What depends on the machine; ``length`` counts <bos> and <eos>."""

    min_count: int
    length: int
    width: int
    layers: int
    dropout: float
    batch_size: int
    steps: int | None  # None for ``epochs`` of them
    epochs: int = 20


SIZES = {
    "cpu": Size(10, 16, 64, 1, 0.0, 32, 500),
    "pruning": Size(5, 20, 128, 2, 0.1, 32, 2500),
    "accelerator": Size(2, 40, 256, 3, 0.1, 128, None),
}


class Attention(nn.Module):
    """Attention of ``queries`` to ``memory``, with several heads."""

    heads: int

    @nn.compact
    def __call__(self, queries: jax.Array, memory: jax.Array, mask: jax.Array) -> jax.Array:
        width = queries.shape[-1]
        size = width // self.heads

        def heads(inputs: jax.Array, name: str) -> jax.Array:
            outputs = nn.Dense(width, name=name)(inputs)
            return outputs.reshape(*inputs.shape[:-1], self.heads, size)

        q, k, v = heads(queries, "query"), heads(memory, "key"), heads(memory, "value")
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(size)
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
        attended = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return nn.Dense(width, name="out")(attended.reshape(queries.shape))


class Block(nn.Module):
    """A pre-norm layer: self-attention, attention to the source if there is one, feed-forward."""

    heads: int
    dropout: float
    train: bool

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        memory: jax.Array | None = None,
        memory_mask: jax.Array | None = None,
    ) -> jax.Array:
        def drop(inputs: jax.Array) -> jax.Array:
            return nn.Dropout(self.dropout, deterministic=not self.train)(inputs)

        y = nn.LayerNorm()(x)
        x = x + drop(Attention(self.heads, name="self_attention")(y, y, mask))
        if memory is not None:
            y = nn.LayerNorm()(x)
            x = x + drop(Attention(self.heads, name="cross_attention")(y, memory, memory_mask))
        y = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + drop(nn.Dense(x.shape[-1])(y))


class Embedding(nn.Module):
    """Tokens and their learned positions."""

    vocabulary: int
    width: int
    dropout: float
    train: bool

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        length = tokens.shape[-1]
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        x = x + nn.Embed(length, self.width)(jnp.arange(length))
        return nn.Dropout(self.dropout, deterministic=not self.train)(x)


class Stack(nn.Module):
    """The sizes of an encoder or a decoder."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    dropout: float
    train: bool


class Encoder(Stack):
    """From source tokens to vectors."""

    @nn.compact
    def __call__(self, source: jax.Array) -> jax.Array:
        x = Embedding(self.vocabulary, self.width, self.dropout, self.train)(source)
        for _ in range(self.layers):
            x = Block(self.heads, self.dropout, self.train)(x, source_mask(source))
        return nn.LayerNorm()(x)


class Decoder(Stack):
    """From the source's vectors and the tokens so far to logits, of one position if it is given."""

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        memory: jax.Array,
        memory_mask: jax.Array,
        position: jax.Array | None = None,
    ) -> jax.Array:
        causal = jnp.tril(jnp.ones((tokens.shape[-1],) * 2, bool))
        x = Embedding(self.vocabulary, self.width, self.dropout, self.train)(tokens)
        for _ in range(self.layers):
            x = Block(self.heads, self.dropout, self.train)(x, causal, memory, memory_mask)
        if position is not None:
            x = jax.lax.dynamic_index_in_dim(x, position, axis=1, keepdims=False)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


class Translator(nn.Module):
    """An encoder-decoder transformer with pre-norm layers and learned positions."""

    source_vocabulary: int
    target_vocabulary: int
    width: int
    layers: int
    heads: int = 4
    dropout: float = 0.0
    train: bool = True

    def setup(self) -> None:
        sizes = (self.width, self.layers, self.heads, self.dropout, self.train)
        self.encoder = Encoder(self.source_vocabulary, *sizes)
        self.decoder = Decoder(self.target_vocabulary, *sizes)

    def __call__(self, source: jax.Array, tokens: jax.Array) -> jax.Array:
        return self.decoder(tokens, self.encoder(source), source_mask(source))

    def greedy(self, source: jax.Array, length: int) -> jax.Array:
        """The likeliest next word, ``length`` times, and never <pad>, <bos> or <unk>."""
        memory = self.encoder(source)

        def body(position: jax.Array, tokens: jax.Array) -> jax.Array:
            logits = self.decoder(tokens[:, :-1], memory, source_mask(source), position)
            logits = logits.at[:, jnp.array([PAD, BOS, UNK])].set(-jnp.inf)
            return tokens.at[:, position + 1].set(jnp.argmax(logits, axis=-1))

        start = jnp.full((len(source), length + 1), PAD, jnp.int32).at[:, 0].set(BOS)
        return jax.lax.fori_loop(0, length, body, start)[:, 1:]


def source_mask(source: jax.Array) -> jax.Array:
    """Which words may be attended to, with axes for heads and queries."""
    return (source != PAD)[:, None, None, :]


class Text(NamedTuple):
    """Pairs of sentences: German and English words, and the raw English lines."""

    german: list[list[str]]
    english: list[list[str]]
    references: list[str]


def read(data_dir: Path) -> dict[str, Text]:
    """The three splits."""
    folder = data_dir / "multi30k"
    texts = {}
    for split, name in SPLITS.items():
        german, english = lines(folder / f"{name}.de.gz"), lines(folder / f"{name}.en.gz")
        texts[split] = Text(words_of(german), words_of(english), english)
    return texts


def lines(path: Path) -> list[str]:
    """The lines of a compressed file."""
    if not path.is_file():
        raise DataError(
            f"Multi30k's file {path.name} is missing in {path.parent}: name the folder that holds "
            "multi30k/ with --data-dir."
        )
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return file.read().strip("\n").split("\n")
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it again.") from error


def words_of(sentences: Iterable[str]) -> list[list[str]]:
    """The lower-cased words and punctuation marks of sentences."""
    return [TOKEN.findall(sentence.lower()) for sentence in sentences]


def vocabulary_of(sentences: list[list[str]], min_count: int) -> list[str]:
    """The words seen at least ``min_count`` times, the most frequent first."""
    counts = collections.Counter(word for sentence in sentences for word in sentence)
    return SPECIAL + [word for word, count in counts.most_common() if count >= min_count]


def encode(sentences: list[list[str]], vocabulary: list[str], length: int) -> np.ndarray:
    """Tokens with <bos> and <eos>, cut or padded to ``length``."""
    index = {word: token for token, word in enumerate(vocabulary)}
    tokens = np.full((len(sentences), length), PAD, np.int32)
    for row, sentence in zip(tokens, sentences, strict=True):
        numbers = [BOS, *(index.get(word, UNK) for word in sentence), EOS][:length]
        row[: len(numbers)] = numbers
    return tokens


def short(text: Text, length: int) -> Text:
    """The pairs of which both sentences fit with <bos> and <eos>."""
    rows = zip(*text, strict=True)
    kept = [row for row in rows if max(len(row[0]), len(row[1])) + 2 <= length]
    return Text(*(list(column) for column in zip(*kept, strict=True)))


def batch_of(source: jax.Array, target: jax.Array) -> Batch:
    """Inputs and weighted targets: each English word is predicted from those before it."""
    labels = target[:, 1:]
    weights = (labels != PAD).astype(jnp.float32)
    return (source, target[:, :-1]), curvax.WeightedTargets(labels, weights)


def batches(source: np.ndarray, target: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of one shape; the last is filled with <pad>, of weight zero."""
    fill = ((0, -len(source) % EVALUATION_BATCH), (0, 0))
    source, target = np.pad(source, fill), np.pad(target, fill)  # PAD is zero
    for start in range(0, len(source), EVALUATION_BATCH):
        part = slice(start, start + EVALUATION_BATCH)
        yield source[part], target[part]


def evaluation(
    model: Translator,
    texts: dict[str, Text],
    vocabularies: tuple[list[str], list[str]],
    length: int,
) -> Callable[[Variables, str], Numbers]:
    """The function ``evaluate`` of the task."""
    german, english = vocabularies
    arrays = {
        split: (encode(text.german, german, length), encode(text.english, english, length))
        for split, text in texts.items()
        if split != "train"
    }

    @jax.jit
    def sums(params: PyTree, source: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        inputs, (labels, weights) = batch_of(source, target)
        logits = model.apply({"params": params}, *inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.sum(weights * losses), jnp.sum(weights)

    @jax.jit
    def translate(params: PyTree, source: jax.Array) -> jax.Array:
        return model.apply({"params": params}, source, length - 1, method="greedy")

    def evaluate(variables: Variables, split: str) -> Numbers:
        parts = [sums(variables.params, *part) for part in batches(*arrays[split])]
        loss, weight = np.sum(np.array(parts, np.float64), axis=0)
        numbers = {"loss": float(loss / weight)}
        if split == "test" and (corpus_bleu := find_corpus_bleu()):
            tokens = [translate(variables.params, source) for source, _ in batches(*arrays[split])]
            references = texts[split].references
            sentences = sentences_of(np.concatenate(tokens)[: len(references)], english)
            score = corpus_bleu(sentences, [references], lowercase=True, force=True)
            numbers["bleu"] = float(score.score)
        return numbers

    return evaluate


def sentences_of(tokens: np.ndarray, vocabulary: list[str]) -> list[str]:
    """The words before <eos>, joined by spaces; sacrebleu tokenizes them again."""
    ended = (row[: row.index(EOS)] if EOS in row else row for row in tokens.tolist())
    return [" ".join(vocabulary[token] for token in row) for row in ended]


def find_corpus_bleu() -> Callable[..., object] | None:
    """The function of sacrebleu, if that is installed."""
    try:
        from sacrebleu import corpus_bleu
    except ImportError:
        return None
    return corpus_bleu


def multi30k(size: str, data_dir: Path) -> Task:
    """Translation of image captions."""
    sizes = SIZES[size]
    texts = read(data_dir)
    vocabularies = (
        vocabulary_of(texts["train"].german, sizes.min_count),
        vocabulary_of(texts["train"].english, sizes.min_count),
    )
    train = short(texts["train"], sizes.length)
    num_examples = len(train.german)
    model = Translator(
        *map(len, vocabularies), sizes.width, sizes.layers, dropout=sizes.dropout, train=True
    )

    def init(key: jax.Array) -> Variables:
        source = jnp.zeros((1, sizes.length), jnp.int32)
        variables = model.clone(train=False).init(key, source, source[:, 1:])
        return Variables(variables["params"], {})

    def apply(
        params: PyTree, inputs: Batch, statistics: PyTree, key: jax.Array
    ) -> tuple[jax.Array, PyTree]:
        return model.apply({"params": params}, *inputs, rngs={"dropout": key}), statistics

    def sample(data: PyTree, indices: jax.Array, key: jax.Array) -> Batch:  # noqa: ARG001
        return batch_of(*(tokens[indices] for tokens in data))

    return Task(
        name="multi30k",
        words=(
            f"German to English on {num_examples:,} captions of Multi30k of at most "
            f"{sizes.length - 2} words, by a transformer of {sizes.layers}+{sizes.layers} layers "
            f"of width {sizes.width} with {len(vocabularies[1]):,} English words"
        ),
        metric="loss",
        data=(
            jnp.asarray(encode(train.german, vocabularies[0], sizes.length)),
            jnp.asarray(encode(train.english, vocabularies[1], sizes.length)),
        ),
        num_examples=num_examples,
        batch_size=sizes.batch_size,
        steps=sizes.steps or sizes.epochs * (num_examples // sizes.batch_size),
        evaluations=8,
        init=init,
        apply=apply,
        loss=curvax.softmax_cross_entropy,
        sample=sample,
        evaluate=evaluation(model.clone(train=False), texts, vocabularies, sizes.length),
        model=model.clone(train=False),
        schedule=warmup_cosine,
    )
