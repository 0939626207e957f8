"""Subword tokenizers over the Rust library `tokenizers`: training, loading, rows of one length."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdl.data.text.rows import check_rows, split_budget, to_arrays
from jaxdl.data.text.tokenizer_files import load_backend
from jaxdl.errors import JaxdlError
from jaxdl.paths import nearest

SPECIAL_TOKENS: dict[str, dict[str, str]] = {
    "bpe": {"pad": "<pad>", "unk": "<unk>", "bos": "<s>", "eos": "</s>", "mask": "<mask>"},
    "byte_level": {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "mask": "<mask>"},
    "wordpiece": {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
}


class Tokenizer:
    """Text to ids and back. Made by `Tokenizer.train` or `Tokenizer.load`.

    Attributes:
      backend: the `tokenizers.Tokenizer`.
      special: role ("pad", "unk", "cls", "sep", "mask", "bos", "eos") -> id, for the roles that it has.
      special_ids: the ids of every special token, int32, sorted.
      vocab_size: one more than the largest id: the rows that an embedding needs.

    Example:
      >>> tokenizer = Tokenizer.train(["the cat sat", "the mat"], kind="wordpiece", vocab_size=40)
      >>> tokenizer.decode(tokenizer.encode("The cat")), sorted(tokenizer.special)
      ('the cat', ['cls', 'mask', 'pad', 'sep', 'unk'])
    """

    def __init__(self, backend: Any, special_tokens: Mapping[str, str]) -> None:
        self.backend = backend
        self.special_tokens = dict(special_tokens)
        missing = [token for token in self.special_tokens.values() if backend.token_to_id(token) is None]
        if missing:
            raise JaxdlError(f"special tokens {missing} are not in the vocabulary; name tokens that it has.")
        self.special = {role: backend.token_to_id(token) for role, token in self.special_tokens.items()}
        added = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self.special_ids = np.array(sorted(added | set(self.special.values())), np.int32)
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        cutter = b"" if backend.pre_tokenizer is None else backend.pre_tokenizer.__getstate__()
        self._is_byte_level = b'"ByteLevel"' in cutter and b'"add_prefix_space":true' not in cutter

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        *,
        kind: str = "byte_level",
        vocab_size: int,
        special_tokens: Mapping[str, str] | None = None,
        extra_tokens: Sequence[str] = (),
        lowercase: bool | None = None,
    ) -> "Tokenizer":
        """Learns a vocabulary.

        Args:
          texts: the training texts, and no others; read once.
          kind: "byte_level" (BPE over bytes, as GPT-2: every text has ids, and decodes to itself), "bpe" (over
            characters, as Llama's; unseen characters become `unk`) or "wordpiece" (as BERT: words and `##` pieces).
          vocab_size: ids, the special ones among them.
          special_tokens: role -> token; None takes `SPECIAL_TOKENS[kind]`. With "cls" and "sep", `encode_batch` puts
            them about each text.
          extra_tokens: further special tokens, such as T5's `<extra_id_0>`.
          lowercase: fold case and strip accents; None does so for "wordpiece" only.

        Raises:
          JaxdlError: an unknown kind, no text, a vocabulary that is too small, `tokenizers` absent; all at once.

        Source: Sennrich et al. 2016, arXiv:1508.07909 (BPE); Radford et al. 2019 (bytes); Schuster, Nakajima 2012.

        Example:
          >>> tokenizer = Tokenizer.train(["naïve café"], vocab_size=270)
          >>> tokenizer.decode(tokenizer.encode("日本 naïve"))
          '日本 naïve'
        """
        from jaxdl.data.text.tokenizer_training import train_backend

        special = SPECIAL_TOKENS.get(kind, {}) if special_tokens is None else dict(special_tokens)
        problems = _train_problems(kind, vocab_size, len({*special.values(), *extra_tokens}), special)
        if problems:
            raise JaxdlError.listing("Tokenizer.train", problems)
        is_lower = kind == "wordpiece" if lowercase is None else lowercase
        return cls(train_backend(texts, kind, vocab_size, special, extra_tokens, is_lower), special)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Loads a tokenizer from files such as Hugging Face's.

        Args:
          path: a `tokenizer.json`, or a folder with one; else with BERT's `vocab.txt`, or GPT-2's or RoBERTa's
            `vocab.json` and `merges.txt`. `tokenizer_config.json` beside it names the special tokens.

        Raises:
          JaxdlError: none of these files, a damaged one, or `tokenizers` absent.

        Example:
          >>> import tempfile
          >>> folder = Tokenizer.train(["one two"], vocab_size=262).save(tempfile.mkdtemp())
          >>> Tokenizer.load(folder).special["eos"]
          2
        """
        return cls(*load_backend(Path(path)))

    def save(self, folder: str | Path) -> Path:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which `transformers.AutoTokenizer` loads unchanged.

        Returns:
          The folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        roles = {f"{role}_token": token for role, token in self.special_tokens.items()}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        return folder

    def id_of(self, role: str) -> int:
        """The id of a special token by its role.

        Raises:
          JaxdlError: the tokenizer has none of this role.

        Example:
          >>> Tokenizer.train(["one two"], vocab_size=262).id_of("pad")
          0
        """
        return id_of(self, role)

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text without special tokens about it: int32 (n,).

        Raises:
          JaxdlError: an empty text.
        """
        if not text:
            raise JaxdlError("the text is empty; drop empty documents before encoding.")
        return np.array(self.backend.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of many texts, with all cores."""
        empty = [i for i, text in enumerate(texts) if not text]
        if empty:
            raise JaxdlError(f"text {empty[0]} is empty; drop empty documents before encoding.")
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode_batch(
        self,
        texts: Sequence[Any],
        length: int,
        *,
        pairs: Sequence[Any] | None = None,
        truncation: str = "longest_first",
        has_details: bool = False,
    ) -> dict[str, np.ndarray]:
        """Encodes texts, or pairs of texts, with their special tokens to rows of one length.

        Args:
          texts: n texts, or n sequences of words (that is how tagged data comes).
          length: tokens of a row, special ones included.
          pairs: n second texts.
          truncation: what gives way where a row is too long: "longest_first", "only_first", "only_second", or "error".
          has_details: also "offsets" (n, T, 2), the first and one past the last character of each token in its text or
            word; "word_ids" (n, T), the number of its word; "part" (n, T), 0 in the first text, 1 in the second; the
            last two are -1 at special tokens and padding.

        Returns:
          "tokens" int32 (n, T), "mask" bool (n, T), True at tokens that are real, "token_types" int32 (n, T).

        Raises:
          JaxdlError: no or empty texts, a length that leaves no room, numbers of texts that differ, an unknown
            truncation, or one that cannot make a row fit.

        Example:
          >>> tokenizer = Tokenizer.train(["a b c"], kind="wordpiece", vocab_size=20)
          >>> tokenizer.encode_batch(["a b"], 6, pairs=["c"])["token_types"].tolist()
          [[0, 0, 0, 0, 1, 1]]
        """
        n_special = self.backend.num_special_tokens_to_add(pairs is not None)
        check_rows(texts, pairs, length, n_special, truncation)
        firsts, seconds = self._plain(texts), None if pairs is None else self._plain(pairs)
        rows = []
        for i, first in enumerate(firsts):
            second = None if seconds is None else seconds[i]
            n_second = 0 if second is None else len(second)
            keep = split_budget(len(first), n_second, length - n_special, truncation, i)
            for part, n in zip((first, second), keep, strict=True):
                if part is not None and len(part) > n:
                    part.truncate(n)
            rows.append(self.backend.post_process(first, second, True))
        return to_arrays(rows, length, self.special.get("pad", 0), has_details=has_details)

    def _plain(self, texts: Sequence[Any]) -> list[Any]:
        is_split = not isinstance(texts[0], str)
        inputs = [self._spaced(words) for words in texts] if is_split else list(texts)
        return self.backend.encode_batch(inputs, is_pretokenized=is_split, add_special_tokens=False)

    def _spaced(self, words: Sequence[str]) -> list[str]:
        """Byte-level pieces hold the blank before a word, which a list of words has lost."""
        return [f" {word}" if self._is_byte_level and i else word for i, word in enumerate(words)]

    def decode(self, ids: Any, *, skip_special: bool = True) -> str:
        """The text of ids (n,); special tokens are left out unless `skip_special=False`."""
        return self.backend.decode(np.asarray(ids).tolist(), skip_special_tokens=skip_special)

    def token(self, index: int) -> str:
        """The token of an id, as the vocabulary spells it."""
        return self.backend.id_to_token(int(index))


def _train_problems(kind: str, vocab_size: int, n_special: int, special: Mapping[str, str]) -> list[str]:
    problems = []
    if kind not in SPECIAL_TOKENS:
        return [f"kind={kind!r} is unknown; nearest: {', '.join(nearest(kind, SPECIAL_TOKENS))}."]
    least = n_special + (256 if kind == "byte_level" else 1)
    if vocab_size < least:
        problems.append(f"vocab_size={vocab_size} is too small for {kind}; use at least {least}.")
    if kind != "byte_level" and "unk" not in special:
        problems.append(f"{kind} meets characters it has not seen; name a special token of the role 'unk'.")
    unknown = [role for role in special if role not in ("pad", "unk", "cls", "sep", "mask", "bos", "eos")]
    problems += [
        f"special token role {role!r} is unknown; nearest: {', '.join(nearest(role, _ROLES))}." for role in unknown
    ]
    return problems


_ROLES = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")


def id_of(tokenizer: Any, role: str) -> int:
    """The id of a special token by its role, for any tokenizer with `special`.

    Raises:
      JaxdlError: it has none.
    """
    if role not in tokenizer.special:
        raise JaxdlError(f"the tokenizer has no token of the role {role!r}; it has {', '.join(tokenizer.special)}.")
    return tokenizer.special[role]


def check_fits(tokenizer: Any, n_embeddings: int) -> None:
    """Refuses a tokenizer that has ids beyond the rows of an embedding; a gather would clamp them without a word.

    Args:
      tokenizer: with `vocab_size`.
      n_embeddings: rows of the embedding; more than needed is fine.

    Raises:
      JaxdlError: too few rows.

    Example:
      >>> from jaxdl.data.text import ByteTokenizer
      >>> check_fits(ByteTokenizer(), 256)
      Traceback (most recent call last):
      jaxdl.errors.JaxdlError: the tokenizer has ids up to 261 and the embedding 256 rows; use the tokenizer that the \
model was trained with, or 262 rows.
    """
    if tokenizer.vocab_size > n_embeddings:
        raise JaxdlError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1} and the embedding {n_embeddings} rows; use the"
            f" tokenizer that the model was trained with, or {tokenizer.vocab_size} rows."
        )
