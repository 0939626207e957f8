"""Words with their vectors: neighbours, analogies, the text format of word2vec."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxdl.data.text.archives import decode_utf8
from jaxdl.errors import JaxdlError
from jaxdl.paths import nearest


class WordVectors:
    """A vector for each word, compared by the cosine.

    Args:
      words: V different words without white space.
      vectors: float (V, D).

    Raises:
      JaxdlError: numbers that differ, a word twice or with white space, no words, NaN or infinity; all at once.

    Example:
      >>> vectors = WordVectors(["king", "queen", "tree"], np.array([[1.0, 0.2], [0.9, 0.3], [-1.0, 1.0]]))
      >>> [word for word, _ in vectors.neighbours("king", 1)]
      ['queen']
    """

    def __init__(self, words: Sequence[str], vectors: np.ndarray) -> None:
        self.words, self.vectors = tuple(words), np.asarray(vectors, np.float32)
        self._place = {word: i for i, word in enumerate(self.words)}
        problems = []
        if self.vectors.ndim != 2 or len(self.vectors) != len(self.words) or not self.words:
            problems.append(f"there are {len(self.words)} words and vectors {self.vectors.shape}; give (words, D).")
        if len(self._place) != len(self.words):
            problems.append(f"{len(self.words) - len(self._place)} words occur twice; keep one of each.")
        odd = [word for word in self.words if word.split() != [word]]
        if odd:
            problems.append(f"the word {odd[0]!r} is empty or holds white space, which files of vectors cannot hold.")
        if not np.isfinite(self.vectors).all():
            problems.append("the vectors hold NaN or infinity; the run that made them has diverged.")
        if problems:
            raise JaxdlError.listing("word vectors", problems)
        lengths = np.linalg.norm(self.vectors, axis=1, keepdims=True)
        self._unit = self.vectors / np.maximum(lengths, 1e-12)

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: str) -> bool:
        return word in self._place

    def __getitem__(self, word: str) -> np.ndarray:
        return self.vectors[self._row(word)]

    def _row(self, word: str) -> int:
        if word not in self._place:
            near = ", ".join(nearest(word, self.words[:20_000]))
            raise JaxdlError(f"{word!r} is not in the vocabulary of {len(self)} words; nearest: {near}.")
        return self._place[word]

    def neighbours(self, word: str, n: int = 10) -> list[tuple[str, float]]:
        """The n words most similar to a word, with their cosines, the best first.

        Raises:
          JaxdlError: an unknown word (with the nearest).
        """
        row = self._row(word)
        return self._best(self._unit[row], {row}, n)

    def analogy(self, a: str, b: str, c: str, n: int = 5) -> list[tuple[str, float]]:
        """Answers "a is to b as c is to ...": the words nearest to `b - a + c`, less the three.

        Raises:
          JaxdlError: an unknown word (with the nearest).

        Source: Mikolov et al. 2013, "Linguistic regularities in continuous space word representations" (3CosAdd).

        Example:
          >>> vectors = np.array([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0], [2.0, 1.0], [-1.0, 0.0]])
          >>> WordVectors(["man", "woman", "king", "queen", "tree"], vectors).analogy("man", "woman", "king", 1)[0][0]
          'queen'
        """
        rows = [self._row(word) for word in (a, b, c)]
        wanted = self._unit[rows[1]] - self._unit[rows[0]] + self._unit[rows[2]]
        return self._best(wanted / max(float(np.linalg.norm(wanted)), 1e-12), set(rows), n)

    def _best(self, unit: np.ndarray, left_out: set[int], n: int) -> list[tuple[str, float]]:
        cosines = self._unit @ unit
        cosines[list(left_out)] = -np.inf
        found = np.argsort(-cosines, kind="stable")[: min(n, len(self) - len(left_out))]
        return [(self.words[row], float(cosines[row])) for row in found]

    def save(self, path: str | Path) -> Path:
        """Writes the text format of word2vec: `V D`, then a line `word number ...` for each word; returns the path.

        Example:
          >>> import tempfile
          >>> path = WordVectors(["a"], np.ones((1, 2))).save(Path(tempfile.mkdtemp()) / "vectors.txt")
          >>> path.read_text()
          '1 2\\na 1 1\\n'
        """
        path = Path(path)
        lines = [f"{len(self)} {self.vectors.shape[1]}"]
        # nine digits bring every float32 back bit for bit
        lines += [
            f"{word} " + " ".join(f"{x:.9g}" for x in row)
            for word, row in zip(self.words, self.vectors.tolist(), strict=True)
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "WordVectors":
        """Reads the text format of word2vec, or GloVe's, which has no first line of sizes.

        Raises:
          JaxdlError: no such file, or a line that does not fit (names it).
        """
        path = Path(path)
        if not path.is_file():
            raise JaxdlError(f"{path} does not exist; check the path.")
        lines = [line.rstrip().split(" ") for line in decode_utf8(path.read_bytes(), path).split("\n") if line.strip()]
        has_sizes = bool(lines) and len(lines[0]) == 2 and lines[0][0].isdigit() and lines[0][1].isdigit()
        rows = lines[1:] if has_sizes else lines
        width = int(lines[0][1]) if has_sizes else len(rows[0]) - 1 if rows else 0
        odd = next((i for i, row in enumerate(rows, 1 + has_sizes) if len(row) != width + 1), None)
        if odd is not None or not rows:
            raise JaxdlError(f"{path} line {odd or 1} is not of the form `word` and {width} numbers; mend the file.")
        if has_sizes and int(lines[0][0]) != len(rows):
            raise JaxdlError(f"{path} promises {lines[0][0]} words and holds {len(rows)}; it was cut short.")
        try:
            return cls([row[0] for row in rows], np.array([row[1:] for row in rows], np.float32))
        except ValueError as error:
            raise error if isinstance(error, JaxdlError) else JaxdlError(f"{path} holds no numbers: {error}.") from None
