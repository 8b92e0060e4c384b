"""Texts as arrays of bytes: UTF-8, the end filled with 0, as `models.text.Text` reads them."""

import warnings
from collections.abc import Sequence

import numpy as np


def encode_text(texts: Sequence[str], length: int) -> np.ndarray:
  """Texts as bytes of UTF-8 in rows of one length.

  A longer text is cut behind its last whole character that fits; a warning says how many are.

  Args:
    texts: n texts.
    length: bytes of a row.

  Returns:
    uint8 [n, length], the end of shorter texts filled with 0.

  Raises:
    TypeError: something else than a list of texts.
    ValueError: a length below 1, a text that holds a NUL character (byte 0 is the filling), or one that is no Unicode.

  Example:
    >>> encode_text(["hi", "été"], 5).tolist()
    [[104, 105, 0, 0, 0], [195, 169, 116, 195, 169]]
  """
  if isinstance(texts, str):
    raise TypeError(f"texts: got the text {texts!r}; pass a list of texts")
  if length < 1:
    raise ValueError(f"length: got {length}; pass the number of bytes of the longest text, at least 1")
  rows, longest, cut = np.zeros((len(texts), length), np.uint8), 0, 0
  for i, text in enumerate(texts):
    if not isinstance(text, str):
      raise TypeError(f"texts: number {i} is {text!r}; pass a list of texts")
    try:
      full = text.encode()
    except UnicodeEncodeError as error:
      raise ValueError(f"texts: number {i}, {text!r}, has no UTF-8: {error.reason}") from error
    if 0 in full:
      raise ValueError(f"texts: number {i}, {text!r}, holds a NUL character, which fills up shorter texts; remove it")
    kept = full if len(full) <= length else full[:length].decode(errors="ignore").encode()
    rows[i, : len(kept)] = np.frombuffer(kept, np.uint8)
    longest, cut = max(longest, len(full)), cut + (len(full) > length)
  if cut:
    warnings.warn(
      f"length: {cut} of {len(texts)} texts are cut to {length} bytes; the longest has {longest}", stacklevel=2
    )
  return rows


def decode_text(rows: np.ndarray) -> list[str]:
  """The texts of rows of bytes, as `encode_text` makes them.

  Args:
    rows: uint8 [n, length].

  Raises:
    ValueError: another shape, or a row that is no UTF-8; it is named.

  Example:
    >>> decode_text(encode_text(["hi", "été", ""], 5))
    ['hi', 'été', '']
  """
  rows = np.asarray(rows)
  if rows.ndim != 2 or rows.dtype.kind not in "iu":
    raise ValueError(f"rows: got {rows.dtype}{list(rows.shape)}; pass bytes [n, length] as uint8")
  texts = []
  for i, row in enumerate(rows):
    try:
      texts.append(bytes(row.tolist()).rstrip(b"\0").decode())
    except (UnicodeDecodeError, ValueError) as error:
      raise ValueError(f"rows: number {i} is no UTF-8 ({error})") from error
  return texts
