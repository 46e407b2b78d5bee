"""What the bytes of a media file say before anything decodes them: its kind, and its end."""

import os
import struct
from typing import BinaryIO

MP4_BOXES = (
    b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"sidx", b"mfra",
    b"meta", b"uuid", b"pnot", b"emsg", b"prft",
)  # fmt: skip
HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


class Bad(Exception):
    """The file cannot be used; the reason in one line."""


def is_picture(head: bytes) -> bool:
    """Whether a file that begins so is a picture that Pillow reads. Refuses HEIC."""
    brands = head[8 : int.from_bytes(head[:4], "big")] if head[4:8] == b"ftyp" else b""
    if b"avif" in brands or b"avis" in brands:
        return True
    if brands[:4] in HEIF:
        raise Bad("a HEIC picture, which cannot be read whole: convert it to JPEG, PNG or AVIF")
    return head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or head[8:12] == b"WEBP"


def code_points(head: bytes) -> tuple[int, int]:
    """Transfer function and primaries of an AVIF (its box colr) or a PNG (its chunk cICP); those of
    BT.709 where it names none."""
    for mark, size in ((b"colrnclx", 2), (b"cICP", 1)):
        at = head.find(mark) + len(mark)
        if len(mark) <= at <= len(head) - 2 * size and head.startswith(b"\x89PNG") == (size == 1):
            primaries, transfer = (head[at + size * k :][:size] for k in (0, 1))
            return int.from_bytes(transfer, "big"), int.from_bytes(primaries, "big")
    return 1, 1


def cut_short(file: BinaryIO, head: bytes, size: int) -> str:
    """What is missing at the end of a Matroska/WebM or MP4/MOV file; "" if nothing.

    FFmpeg plays truncated files without an error.
    """
    if head[:4] == b"\x1a\x45\xdf\xa3":  # EBML head, then a segment with its length
        file.seek(4)
        if (length := _ebml_size(file)) is None:
            return ""
        file.seek(length, os.SEEK_CUR)
        if file.read(4) != b"\x18\x53\x80\x67" or (length := _ebml_size(file)) is None:
            return ""  # a live recording, or invalid, which FFmpeg reports
        end = file.tell() + length
        return f"{size} bytes of {end}" if end > size else ""
    at = 0
    while at + 8 <= size:
        file.seek(at)
        length, kind = struct.unpack(">I4s", file.read(8))
        if kind not in MP4_BOXES:
            break
        if length == 1:
            length = int.from_bytes(file.read(8), "big")
        if length < 8:  # 0: up to the end; else invalid, which FFmpeg reports
            break
        at += length
    return f"{size} bytes of {at}" if at > size else ""


def gif_images(file: BinaryIO, size: int) -> int:
    """The number of images in a GIF. It needs no end mark, and what follows its last block, another
    GIF for example, is not part of it. Refuses one that ends inside a block."""

    def skip_palette(flags: int) -> None:
        file.seek(3 << (flags & 7) + 1 if flags & 0x80 else 0, os.SEEK_CUR)

    images = 0
    file.seek(10)
    skip_palette(file.read(3)[0] if size > 13 else 0)
    while (kind := file.read(1)) in (b"\x21", b"\x2c"):  # an extension, or an image
        if kind == b"\x2c" and len(place := file.read(9)) == 9:
            skip_palette(place[8])
            images += 1
        file.seek(1, os.SEEK_CUR)
        while (length := file.read(1)) > b"\0":
            file.seek(length[0], os.SEEK_CUR)
        if not length:
            raise Bad("cut short: it ends inside a block")
    if file.tell() > size:
        raise Bad("cut short: it ends inside a block")
    return images


def _ebml_size(file: BinaryIO) -> int | None:
    """A Matroska length: the leading zeros of the first byte count the bytes that follow."""
    first = file.read(1)
    if not first or first == b"\0":
        return None
    extra = 8 - first[0].bit_length()
    value = int.from_bytes(bytes([first[0] & (0x7F >> extra)]) + file.read(extra), "big")
    return None if value == (1 << 7 * (extra + 1)) - 1 else value
