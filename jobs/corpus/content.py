"""The bytes of a text file: on the disk, or in memory where they were compressed or re-encoded.

A file on the disk is never held whole, so that its size does not matter.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, ClassVar

from jobs.corpus.documents import DECODED, Remarks
from jobs.corpus.places import unreadable
from jobs.corpus.tables import arrow
from sparsify.errors import InputError, first_line

_BLOCK_BYTES = 8 << 20

_HEAD_BYTES = 1 << 16

_MOST_NULS = 0.02  # of the first bytes of a text

_BYTE_ORDERS = {  # 32 first: its little-endian mark begins with that of 16
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


class Content:
    """The bytes of a text in UTF-8.

    Args:
        path: the file, for messages and for reading.
        raw: its bytes, or some of them, where they are in memory.
        offset: where in the file `raw` begins.
    """

    _opened: ClassVar[tuple[Content, IO[bytes]] | None] = None  # one at a time, whatever the folder

    def __init__(self, path: Path, raw: bytes | None = None, offset: int = 0) -> None:
        self.path = path
        self.remarks = Remarks()
        self._raw, self._offset = raw, offset
        try:
            self.size = path.stat().st_size if raw is None else len(raw)
        except OSError as error:
            raise unreadable(path, error) from None
        self.begin = len(codecs.BOM_UTF8) if self._is_marked(offset) else 0
        """where the text begins, behind a byte order mark"""

    def _is_marked(self, offset: int) -> bool:
        return offset == 0 and self.read(0, len(codecs.BOM_UTF8)) == codecs.BOM_UTF8

    @classmethod
    def of_file(cls, path: Path, compression: str | None) -> Content:
        """A file's text, decompressed and decoded where it says that it has to be.

        Raises:
            InputError: it cannot be read, or looks like UTF-16 without a byte order mark.
        """
        content = cls(path, None if compression is None else _decompressed(path, compression))
        head = content.read(0, _HEAD_BYTES)
        for mark, name in _BYTE_ORDERS.items():
            if head.startswith(mark):
                content = cls(path, _reencoded(path, content.read(0, content.size), name))
                content.remarks.add(DECODED, path.name)
                return content
        if head.count(0) > _MOST_NULS * len(head):
            raise InputError(
                f"data source {path}: not UTF-8 at byte {head.index(0)} (0x00), but perhaps UTF-16 "
                "without a byte order mark; convert it, for example with iconv -f utf-16 -t utf-8"
            )
        return content

    @property
    def is_file(self) -> bool:
        """Whether it is the file's bytes as they are, none of them in memory."""
        return self._raw is None

    def read(self, begin: int, end: int) -> bytes:
        """The bytes from `begin` to before `end`."""
        if self._raw is not None:
            return self._raw[begin:end]
        try:
            file = self._file()
            file.seek(begin)
            return file.read(max(0, end - begin))
        except OSError as error:
            raise unreadable(self.path, error) from None

    def text(self, begin: int, end: int) -> str:
        """The text from byte `begin` to before `end`, with plain line ends."""
        return as_text(self.path, self.read(begin, end), self._offset + begin)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Every line with its end, and where it begins."""
        begin = self.begin
        try:
            with self.path.open("rb") if self._raw is None else io.BytesIO(self._raw) as file:
                file.seek(begin)
                for line in file:
                    yield begin, line
                    begin += len(line)
        except OSError as error:
            raise unreadable(self.path, error) from None

    def find(self, wanted: bytes) -> Iterator[int]:
        """Every place where the bytes `wanted` begin."""
        begin, kept = self.begin, b""
        while block := self.read(begin, begin + _BLOCK_BYTES):
            data, first = kept + block, begin - len(kept)
            at = data.find(wanted)
            while at >= 0:
                yield first + at
                at = data.find(wanted, at + 1)
            kept = data[max(0, len(data) - len(wanted) + 1) :]
            begin += len(block)

    def _file(self) -> IO[bytes]:
        if Content._opened is None or Content._opened[0] is not self:
            if Content._opened is not None:
                Content._opened[1].close()
            Content._opened = None
            Content._opened = self, self.path.open("rb")
        return Content._opened[1]


def as_text(path: Path, raw: bytes, offset: int = 0) -> str:
    """Bytes of a file, `offset` bytes from its start, as text with plain line ends.

    Raises:
        InputError: they are not UTF-8; names the byte.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"data source {path}: not UTF-8 at byte {offset + error.start} "
            f"(0x{raw[error.start]:02x}); convert it, for example with iconv -f latin1 -t utf-8"
        ) from None
    return text.replace("\r\n", "\n")


def _decompressed(path: Path, compression: str) -> bytes:
    if compression == ".zst":
        return _from_zstd(path)
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    try:
        with openers[compression](path) as file:
            return bytes(file.read())
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise unreadable(path, error) from None


def _from_zstd(path: Path) -> bytes:
    pyarrow = arrow()
    try:
        with pyarrow.input_stream(str(path), compression="zstd") as file:
            return bytes(file.read())
    except (OSError, pyarrow.ArrowException) as error:
        raise unreadable(path, Exception(first_line(error))) from None


def _reencoded(path: Path, raw: bytes, encoding: str) -> bytes:
    try:
        return raw.decode(encoding).encode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"data source {path}: not {encoding.upper()} at byte {error.start}, though its byte "
            "order mark says so; convert it to UTF-8"
        ) from None
