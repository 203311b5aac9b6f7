"""Splats that other tools pack: to the columns of a standard 3DGS .ply, byte by byte.

compressed .ply   SuperSplat's and gsplat's: chunks of 256 with bounds, four 32-bit words a Gaussian
.splat            antimatter15's: 32 bytes a Gaussian, plain colours
.spz              Niantic's, versions 1 to 4: planes of bytes, gzip or zstd around them
.sog              PlayCanvas's, version 2: lossless WebP pictures and code books in a zip

Every decoder takes what was read and raises ValueError with what is wrong with it.

Shape suffixes: N Gaussians, K coefficients of a colour channel.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scenesplat.gaussians import C0

Columns = dict[str, NDArray]
CHUNK = 256  # Gaussians that share bounds in a compressed .ply
COEFFICIENTS = {0: 0, 1: 3, 2: 8, 3: 15}  # of the higher bands, by degree
SPZ_COLOUR = 0.15  # step of spz's plain colours
LARGEST_SPLAT = 50_000_000  # Gaussians that a header may declare


def columns(
    places_N3: NDArray,
    colours_N3: NDArray,
    rest_NK3: NDArray | None,
    opacities_N: NDArray,
    scales_N3: NDArray,
    quaternions_N4: NDArray,
) -> Columns:
    """As a standard .ply names them: harmonics, logits, logarithms; w of the quaternion first."""
    parts = {"f_dc_": colours_N3, "scale_": scales_N3, "rot_": quaternions_N4}
    if rest_NK3 is not None and rest_NK3.shape[1]:
        parts["f_rest_"] = rest_NK3.transpose(0, 2, 1).reshape(len(rest_NK3), -1)  # channel by channel
    found = {name: places_N3[:, i] for i, name in enumerate("xyz")}
    found |= {f"{stem}{i}": part[:, i] for stem, part in parts.items() for i in range(part.shape[1])}
    return {**found, "opacity": opacities_N}


def logit(share: NDArray) -> NDArray:
    """Of opacities of 8 bits: 0 and 255 stand for less than half a step from the end."""
    share = share.clip(1e-6, 1 - 1e-6)
    return np.log(share / (1 - share))


def smallest_three(parts_N3: NDArray, largest_N: NDArray) -> NDArray:
    """Quaternions [N, 4] of three components in order and the number of the fourth, which is the largest."""
    whole_N4 = np.zeros((len(parts_N3), 4))
    others_43 = np.array([[j for j in range(4) if j != i] for i in range(4)])
    np.put_along_axis(whole_N4, others_43[largest_N], parts_N3, 1)
    rest_N1 = np.sqrt(np.maximum(0, 1 - (parts_N3**2).sum(1, keepdims=True)))
    np.put_along_axis(whole_N4, largest_N[:, None], rest_N1, 1)
    return whole_N4


# Compressed .ply -----------------------------------------------------------------------------------------------------


def decompressed(chunk: Mapping[str, NDArray], vertex: Mapping[str, NDArray], sh: Mapping[str, NDArray]) -> Columns:
    """The elements of a compressed .ply; `sh` is empty for degree 0."""
    words = {
        name: np.asarray(vertex[f"packed_{name}"]).astype(np.uint32)
        for name in ("position", "rotation", "scale", "color")
    }
    count = len(words["position"])
    row = np.arange(count) // CHUNK
    if len(chunk["min_x"]) < -(-count // CHUNK):
        raise ValueError(f"{len(chunk['min_x'])} chunks for {count:,} Gaussians, expected {-(-count // CHUNK)}")

    def bits(name: str, shift: int, width: int) -> NDArray:
        return ((words[name] >> np.uint32(shift)) & np.uint32((1 << width) - 1)) / float((1 << width) - 1)

    def between(share: NDArray, name: str) -> NDArray:
        if name in ("r", "g", "b") and f"min_{name}" not in chunk:  # colours of early files have no bounds
            return share
        low, high = (np.asarray(chunk[f"{end}_{name}"], np.float64)[row] for end in ("min", "max"))
        return low * (1 - share) + high * share

    layout = ((21, 11), (11, 10), (0, 11))
    places, scales = (
        np.stack([between(bits(name, *at), f"{stem}{axis}") for at, axis in zip(layout, "xyz")], 1)
        for name, stem in (("position", ""), ("scale", "scale_"))
    )
    three = (np.stack([bits("rotation", shift, 10) for shift in (20, 10, 0)], 1) - 0.5) * np.sqrt(2)
    quaternions = smallest_three(three, (words["rotation"] >> np.uint32(30)).astype(np.int64))
    shades = np.stack([between(bits("color", shift, 8), axis) for shift, axis in ((24, "r"), (16, "g"), (8, "b"))], 1)
    rest = None
    if sh:
        bytes_NC = np.stack([np.asarray(sh[f"f_rest_{i}"]) for i in range(len(sh))], 1).astype(np.float64)
        shares = np.where(bytes_NC == 0, 0.0, np.where(bytes_NC == 255, 1.0, (bytes_NC + 0.5) / 256))
        rest = ((shares - 0.5) * 8).reshape(count, 3, -1).transpose(0, 2, 1)
    return columns(places, (shades - 0.5) / C0, rest, logit(bits("color", 0, 8)), scales, quaternions)


# .splat --------------------------------------------------------------------------------------------------------------


def splat(content: bytes) -> Columns:
    """Places and standard deviations as floats, colours with opacity and a quaternion as bytes."""
    if not content or len(content) % 32:
        raise ValueError(f"{len(content):,} bytes are not a multiple of 32")
    kind = np.dtype([("place", "<f4", 3), ("scale", "<f4", 3), ("colour", "u1", 4), ("turn", "u1", 4)])
    table = np.frombuffer(content, kind)
    colours = table["colour"] / 255.0
    quaternions = table["turn"] / 128.0 - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = np.log(table["scale"].astype(np.float64))
    return columns(
        table["place"].astype(np.float64), (colours[:, :3] - 0.5) / C0, None, logit(colours[:, 3]), scales, quaternions
    )


# .spz ----------------------------------------------------------------------------------------------------------------


def spz(content: bytes) -> Columns:
    """Versions 1 to 3 (one gzip stream) and 4 (a zstd stream for each attribute)."""
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"its gzip stream is damaged ({error})") from None
    if len(content) < 16 or content[:4] != b"NGSP":
        raise ValueError("it does not begin with NGSP")
    version, count, degree, fraction, _, streams = struct.unpack("<IIBBBB", content[4:16])
    if version not in (1, 2, 3, 4):
        raise ValueError(f"version {version}, 1 to 4 are known")
    if degree not in COEFFICIENTS:
        raise ValueError(f"colours of degree {degree}, 0 to 3 are known")
    if count > LARGEST_SPLAT:
        raise ValueError(f"{count:,} Gaussians are declared, at most {LARGEST_SPLAT:,} are read")
    sizes = [count * size for size in (6 if version == 1 else 9, 1, 3, 3, 3 if version < 3 else 4)]
    sizes += [3 * COEFFICIENTS[degree] * count] if degree else []
    parts = _zstd_streams(content, sizes, streams) if version == 4 else _planes(content[16:], sizes)
    place, alpha, colour, scale, turn = (np.frombuffer(part, np.uint8) for part in parts[:5])
    if version == 1:  # halves
        places = np.frombuffer(parts[0], "<f2").reshape(count, 3).astype(np.float64)
    else:  # 24 bits with a sign
        whole = place.reshape(count, 3, 3).astype(np.int32)
        fixed = whole[..., 0] | whole[..., 1] << 8 | whole[..., 2] << 16
        places = (fixed - ((fixed & 0x800000) << 1)) / float(1 << fraction)
    if version < 3:
        three = turn.reshape(count, 3) / 127.5 - 1
        w = np.sqrt(np.maximum(0, 1 - (three**2).sum(1, keepdims=True)))
        quaternions = np.concatenate([w, three], 1)
    else:  # a sign and nine bits each, the last in the lowest ones; x, y, z, w
        word = np.frombuffer(parts[4], "<u4").astype(np.int64)
        fields = np.stack([word >> 20, word >> 10, word], 1)
        three = (fields & 511) / 511 * np.sqrt(0.5) * np.where(fields & 512, -1, 1)
        quaternions = smallest_three(three, word >> 30)[:, [3, 0, 1, 2]]
    rest = None
    if degree:
        rest = (np.frombuffer(parts[5], np.uint8).astype(np.float64) - 128).reshape(count, -1, 3) / 128
    colours = (colour.reshape(count, 3) / 255 - 0.5) / SPZ_COLOUR
    return columns(places, colours, rest, logit(alpha / 255), scale.reshape(count, 3) / 16 - 10, quaternions)


def _planes(content: bytes, sizes: list[int]) -> list[bytes]:
    ends = np.cumsum([0, *sizes]).tolist()
    if len(content) < ends[-1]:
        raise ValueError(f"it is cut short: {len(content):,} of {ends[-1]:,} bytes")
    return [content[start:end] for start, end in itertools.pairwise(ends)]


def _zstd_streams(content: bytes, sizes: list[int], streams: int) -> list[bytes]:
    import pyarrow

    (table,) = struct.unpack("<I", content[16:20]) if len(content) >= 32 else (0,)
    at = table + 16 * streams
    if streams != len(sizes) or table < 32 or at > len(content):
        raise ValueError(f"{streams} streams, expected {len(sizes)}; it is damaged")
    found = []
    for number, size in enumerate(sizes):
        packed, plain = struct.unpack("<QQ", content[table + 16 * number : table + 16 * number + 16])
        if plain != size or at + packed > len(content):
            raise ValueError(f"stream {number + 1} is cut short or of another size")
        try:
            found.append(pyarrow.decompress(content[at : at + packed], plain, "zstd", asbytes=True))
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"stream {number + 1} is damaged ({error})") from None
        at += packed
    return found


# .sog ----------------------------------------------------------------------------------------------------------------


def sog(content: bytes) -> Columns:
    """A zip with meta.json and pictures whose pixels are Gaussians."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            names = {*file.namelist()}
            if "meta.json" not in names:
                raise ValueError("meta.json is missing in it")
            meta = json.loads(file.read("meta.json"))
            if not isinstance(meta, dict) or meta.get("version") != 2:
                found = meta.get("version", "1 or none") if isinstance(meta, dict) else "none"
                raise ValueError(f"version {found}, 2 is known")
            return _sog(meta, lambda name: _pixels(file.read(name), name))
    except (KeyError, TypeError, IndexError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"it is damaged ({type(error).__name__}: {error})") from None


def _pixels(content: bytes, name: str) -> NDArray:
    """[H, W, 4] of a WebP picture."""
    try:
        with Image.open(io.BytesIO(content)) as picture:
            return np.asarray(picture.convert("RGBA"))
    except OSError as error:
        raise ValueError(f"{name} is no picture ({error})") from None


def _sog(meta: Mapping[str, Any], picture: Callable[[str], NDArray]) -> Columns:
    of: dict[str, Mapping[str, Any]] = {key: meta[key] for key in ("means", "scales", "quats", "sh0")}
    count = int(meta["count"])

    def pixels(part: Mapping[str, Any], number: int = 0) -> NDArray:
        found = picture(part["files"][number]).reshape(-1, 4)
        if len(found) < count:
            raise ValueError(f"{part['files'][number]} has {len(found):,} pixels for {count:,} Gaussians")
        return found[:count].astype(np.int64)

    low, high = (np.asarray(of["means"][key], np.float64) for key in ("mins", "maxs"))
    span = np.where(high > low, high - low, 1.0)
    steps = pixels(of["means"], 0)[:, :3] | pixels(of["means"], 1)[:, :3] << 8
    logarithms = low + span * steps / 65535
    places = np.sign(logarithms) * np.expm1(np.abs(logarithms))
    turn = pixels(of["quats"])
    three = (turn[:, :3] / 255 * 2 - 1) * np.sqrt(0.5)
    known = turn[:, 3] >= 252
    quaternions = smallest_three(three, np.where(known, turn[:, 3] - 252, 0))
    quaternions = np.where(known[:, None], quaternions, [[1.0, 0, 0, 0]])
    scales = np.asarray(of["scales"]["codebook"], np.float64)[pixels(of["scales"])[:, :3]]
    shade = pixels(of["sh0"])
    colours = np.asarray(of["sh0"]["codebook"], np.float64)[shade[:, :3]]
    rest = None
    if meta.get("shN"):
        more: Mapping[str, Any] = meta["shN"]
        book = np.asarray(more["codebook"], np.float64)
        each = COEFFICIENTS[int(more["bands"])]
        entries = picture(more["files"][0])[..., :3]
        palette = book[entries.reshape(len(entries), 64, each, 3)].reshape(-1, each, 3)  # 64 entries a row
        label = pixels(more, 1)
        number = label[:, 0] | label[:, 1] << 8
        rest = np.where((number < len(palette))[:, None, None], palette[number.clip(max=len(palette) - 1)], 0.0)
    return columns(places, colours, rest, logit(shade[:, 3] / 255), scales, quaternions)
