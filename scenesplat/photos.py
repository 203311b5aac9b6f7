"""Pictures with cameras: of a furnished room, of a COLMAP folder, of a nerfstudio `transforms.json`.

Cameras are pinholes afterwards: lenses with radial and tangential distortion are undone, others are refused by name.

Shape suffixes: H W pixels, Q points, I pictures.
"""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common.errors import UserError
from common.files import read_object
from common.images import open_rgb, resize_uint8
from scenesplat.fit_config import PicturesConfig
from scenesplat.ply import read_ply
from scenesplat.rasterize import Camera, render
from scenesplat.rooms import Room, make_room

KNOWN = 0.5  # alpha above which a room's picture has a depth
MILLIMETRE = 0.001  # nerfstudio's default unit of whole-number depths
# COLMAP's models: number, parameters, and the names of those parameters (f: both focal lengths).
MODELS = {
    "SIMPLE_PINHOLE": (0, "f cx cy"),
    "PINHOLE": (1, "fx fy cx cy"),
    "SIMPLE_RADIAL": (2, "f cx cy k1"),
    "RADIAL": (3, "f cx cy k1 k2"),
    "OPENCV": (4, "fx fy cx cy k1 k2 p1 p2"),
    "OPENCV_FISHEYE": (5, "fx fy cx cy k1 k2 k3 k4"),
    "FULL_OPENCV": (6, "fx fy cx cy k1 k2 p1 p2 k3 k4 k5 k6"),
    "FOV": (7, "fx fy cx cy omega"),
    "SIMPLE_RADIAL_FISHEYE": (8, "f cx cy k1"),
    "RADIAL_FISHEYE": (9, "f cx cy k1 k2"),
    "THIN_PRISM_FISHEYE": (10, "fx fy cx cy k1 k2 p1 p2 k3 k4 sx1 sy1"),
}
PLAIN = ("SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV")
UNDISTORT = "`colmap image_undistorter --image_path images --input_path sparse/0 --output_path undistorted`"


@dataclass
class Photo:
    """A picture: uint8 colours [H, W, 3], and metres of depth [H, W] (0 where unknown) if there is any."""

    name: str
    camera: Camera
    rgb_HW3: Tensor
    depth_HW: Tensor | None = None


@dataclass
class Photos:
    """What Gaussians are fitted to.

    Args:
        points_Q3, colours_Q3: where surfaces are known to be, colours 0 to 1; none: empty.
        room: what the pictures were rendered from, where it was a room.
    """

    train: list[Photo]
    held_out: list[Photo]
    points_Q3: Tensor = field(default_factory=lambda: torch.zeros(0, 3))
    colours_Q3: Tensor = field(default_factory=lambda: torch.zeros(0, 3))
    room: Room | None = None

    @property
    def radius(self) -> float:
        """Of the cameras' places around their middle, times 1.1 (gsplat's scale of a scene)."""
        places_I3 = torch.stack([photo.camera.place_3 for photo in self.train])
        return 1.1 * max(1e-3, float((places_I3 - places_I3.mean(0)).norm(dim=1).max()))

    def with_fused_points(self) -> Photos:
        """With the points that the depth pictures show, where no others are known."""
        if not len(self.points_Q3):
            parts = [seen_points(photo) for photo in self.train if photo.depth_HW is not None]
            if parts:
                self.points_Q3, self.colours_Q3 = (torch.cat(part) for part in zip(*parts))
        return self


def seen_points(photo: Photo) -> tuple[Tensor, Tensor]:
    """Points [Q, 3] of a depth picture in the world, and their colours."""
    assert photo.depth_HW is not None
    camera = photo.camera
    rows, columns = (photo.depth_HW > 0).nonzero().unbind(1)
    z_Q = photo.depth_HW[rows, columns]
    (fx, _, cx), (_, fy, cy), _ = camera.intrinsics_33.unbind(0)
    seen_Q3 = torch.stack([(columns + 0.5 - cx) / fx * z_Q, (rows + 0.5 - cy) / fy * z_Q, z_Q], 1)
    points_Q3 = (seen_Q3 - camera.world_44[:3, 3]) @ camera.world_44[:3, :3]
    return points_Q3, photo.rgb_HW3[rows, columns].float() / 255


def open_photos(options: PicturesConfig, seed: int) -> Photos:
    """What the options describe.

    Raises:
        UserError: the folder holds no posed pictures, or something in it is damaged or of a kind that is not read.
    """
    if options.path is None:
        return room_photos(make_room(options.room, "test", options.density), options, seed)
    folder = Path(options.path)
    if not folder.is_dir():
        raise UserError(f"--pictures.path {folder}: no such folder; expected one with transforms.json, or COLMAP's")
    sparse = next((folder / p for p in ("sparse/0", "sparse", "colmap/sparse/0") if _colmap_files(folder / p)), None)
    if (folder / "transforms.json").is_file():
        found, points = list(_transforms(folder, options)), _transforms_points(folder)
    elif sparse is not None:
        found, points = list(_colmap(folder, sparse, options)), _colmap_points(sparse)
    else:
        raise UserError(
            f"--pictures.path {folder}: expected transforms.json (nerfstudio), or images/ and sparse/0/cameras.bin or "
            ".txt (COLMAP); poses come from `ns-process-data images --data PICTURES --output-dir FOLDER`, or from "
            "`colmap automatic_reconstructor --workspace_path FOLDER --image_path FOLDER/images`"
        )
    return split(found, options, *points)


def split(found: list[Photo], options: PicturesConfig, points_Q3: Tensor, colours_Q3: Tensor) -> Photos:
    """Every so many-th picture held out; of the others the least sharp left out.

    Raises:
        UserError: too few are left.
    """
    held_out, train = found[:: options.test_every], [p for i, p in enumerate(found) if i % options.test_every]
    if options.drop_blurred:
        order = sorted(train, key=lambda photo: -sharpness(photo.rgb_HW3))
        kept = {photo.name for photo in order[: len(train) - int(options.drop_blurred * len(train))]}
        train = [photo for photo in train if photo.name in kept]
    if len(train) < 2:
        raise UserError(f"{len(found)} posed pictures, {len(train)} to fit to: expected 3 at least")
    if not options.depth:
        for photo in found:
            photo.depth_HW = None
    return Photos(train, held_out, points_Q3, colours_Q3)


def sharpness(rgb_HW3: Tensor) -> float:
    """Variance of the Laplacian of the grey picture: low for blurred ones (section 2.8 of the dataset)."""
    grey_HW = rgb_HW3.float().mean(2)
    kernel_33 = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])
    return float(F.conv2d(grey_HW[None, None], kernel_33[None, None]).var())


@torch.no_grad()
def room_photos(room: Room, options: PicturesConfig, seed: int) -> Photos:
    """Renders of a room."""
    found = []
    for number, camera in enumerate(room.cameras(options.views, options.width or 320, seed)):
        picture = render(room.gaussians, camera)
        rgb_HW3 = (picture.rgb_HW3.clamp(0, 1) * 255).round().byte()
        found.append(
            Photo(f"view {number}", camera, rgb_HW3, torch.where(picture.alpha_HW > KNOWN, picture.depth_HW, 0).clone())
        )
    photos = split(found, options, torch.zeros(0, 3), torch.zeros(0, 3))
    photos.room = room
    return photos


# Pictures of the user's -----------------------------------------------------------------------------------------------


def _photo(
    name: str,
    file: Path,
    world_44: Tensor,
    lens: Mapping[str, float],
    options: PicturesConfig,
    depth: Path | None = None,
) -> Photo:
    """A picture file with its pose, shrunk and undistorted.

    Args:
        lens: fx, fy, cx, cy and size in pixels (0 where it is not known), and k1, k2, p1, p2.
    """
    rgb_HW3 = torch.from_numpy(open_rgb(file).copy())
    height, width = rgb_HW3.shape[:2]
    stated = lens.get("w") or width, lens.get("h") or height
    if abs(stated[0] / stated[1] - width / height) > 0.02:
        raise UserError(f"{file}: {width} x {height} pixels, its camera has {stated[0]:g} x {stated[1]:g}")
    new = (
        (options.width, max(1, round(height * options.width / width))) if 0 < options.width < width else (width, height)
    )
    if new != (width, height):
        rgb_HW3 = resize_uint8(rgb_HW3.permute(2, 0, 1)[None], (new[1], new[0]))[0].permute(1, 2, 0)
    sx, sy = new[0] / stated[0], new[1] / stated[1]
    intrinsics_33 = torch.tensor(
        [[lens["fx"] * sx, 0, lens["cx"] * sx], [0, lens["fy"] * sy, lens["cy"] * sy], [0, 0, 1]]
    )
    camera = Camera(world_44.float(), intrinsics_33.float(), *new)
    depth_HW = None if depth is None or not options.depth else _depth(depth, new, lens.get("depth_unit", MILLIMETRE))
    bent = [lens.get(key, 0.0) for key in ("k1", "k2", "p1", "p2")]
    if any(bent):
        rgb_HW3, depth_HW = _straightened(rgb_HW3, depth_HW, camera, bent)
    return Photo(name, camera, rgb_HW3.contiguous(), depth_HW)


def _depth(file: Path, size: tuple[int, int], unit: float) -> Tensor:
    """[H, W] metres of a depth picture: .npy in metres, or whole numbers of `unit` in 16 bits."""
    try:
        if file.suffix == ".npy":
            values = torch.from_numpy(np.load(file, allow_pickle=False)).float().squeeze()
        else:
            with Image.open(file) as picture:
                values = torch.from_numpy(np.asarray(picture).astype(np.float32)) * unit
        if values.ndim != 2:
            raise ValueError(f"{values.ndim} dimensions")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a depth picture ({error}); expected one channel of 16 bits, or .npy") from None
    values = torch.where(values.isfinite(), values, 0)
    return F.interpolate(values[None, None], (size[1], size[0]), mode="nearest")[0, 0]


def _straightened(
    rgb_HW3: Tensor, depth_HW: Tensor | None, camera: Camera, bent: list[float]
) -> tuple[Tensor, Tensor | None]:
    """The picture that a pinhole of the same focal lengths would have taken."""
    k1, k2, p1, p2 = bent
    (fx, _, cx), (_, fy, cy), _ = camera.intrinsics_33.tolist()
    rows, columns = torch.meshgrid(torch.arange(camera.height) + 0.5, torch.arange(camera.width) + 0.5, indexing="ij")
    x, y = (columns - cx) / fx, (rows - cy) / fy
    r = x * x + y * y
    radial = 1 + r * (k1 + r * k2)
    u = x * radial + 2 * p1 * x * y + p2 * (r + 2 * x * x)
    v = y * radial + p1 * (r + 2 * y * y) + 2 * p2 * x * y
    places = torch.stack([2 * (u * fx + cx) / camera.width - 1, 2 * (v * fy + cy) / camera.height - 1], 2)[None]
    colours = F.grid_sample(rgb_HW3.permute(2, 0, 1)[None].float(), places, padding_mode="border", align_corners=False)
    if depth_HW is not None:
        depth_HW = F.grid_sample(depth_HW[None, None], places, mode="nearest", align_corners=False)[0, 0]
    return colours[0].permute(1, 2, 0).round().clamp(0, 255).byte(), depth_HW


def _transforms(folder: Path, options: PicturesConfig) -> Iterator[Photo]:
    """nerfstudio's frames: cameras look along -z with y up, matrices lead from the camera to the world."""
    file = folder / "transforms.json"
    content = read_object(file, kinds={"frames": list})
    flip = torch.diag(torch.tensor([1.0, -1, -1, 1], dtype=torch.float64))
    model = content.get("camera_model", "OPENCV")
    if model not in PLAIN:
        raise UserError(f"{file}: camera_model {model} is not read; make pinholes of it with {UNDISTORT}")
    for number, frame in enumerate(sorted(content["frames"], key=lambda frame: str(frame.get("file_path")))):
        lens = {**content, **frame}
        try:
            matrix_44 = torch.tensor(frame["transform_matrix"], dtype=torch.float64)
            place = folder / frame["file_path"]
            place = place if place.suffix else place.with_suffix(".png")
            world_44 = torch.linalg.inv(matrix_44.view(4, 4) @ flip)
            given = _lens(lens, place)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{file}: frame {number + 1}: {error!r}; expected file_path, transform_matrix (4 x 4), and fl_x or "
                "camera_angle_x"
            ) from None
        if any(float(lens.get(key, 0) or 0) for key in ("k3", "k4")):
            raise UserError(f"{file}: frame {number + 1} has k3 or k4; make pinholes of it with {UNDISTORT}")
        depth = folder / frame["depth_file_path"] if frame.get("depth_file_path") else None
        yield _photo(str(frame["file_path"]), place, world_44, given, options, depth)


def _lens(found: Mapping[str, Any], file: Path) -> dict[str, float]:
    """nerfstudio's names to ours."""
    width, height = float(found.get("w", 0)), float(found.get("h", 0))
    if not width or not height:
        height, width = (float(v) for v in open_rgb(file).shape[:2])
    if "fl_x" in found:
        fx = float(found["fl_x"])
    else:
        fx = 0.5 * width / math.tan(float(found["camera_angle_x"]) / 2)
    lens = {"fx": fx, "fy": float(found.get("fl_y", fx)), "w": width, "h": height}
    lens |= {"cx": float(found.get("cx", width / 2)), "cy": float(found.get("cy", height / 2))}
    lens["depth_unit"] = float(found.get("depth_unit_scale_factor", MILLIMETRE))
    return lens | {key: float(found.get(key, 0) or 0) for key in ("k1", "k2", "p1", "p2")}


def _transforms_points(folder: Path) -> tuple[Tensor, Tensor]:
    name = read_object(folder / "transforms.json").get("ply_file_path")
    if not name or not (folder / name).is_file():
        return torch.zeros(0, 3), torch.zeros(0, 3)
    return point_cloud(folder / name)


def point_cloud(file: Path) -> tuple[Tensor, Tensor]:
    """Points [Q, 3] of a .ply and their colours, grey where it has none."""
    columns = read_ply(file)
    try:
        points = np.stack([np.asarray(columns[key], np.float32) for key in "xyz"], 1)
    except KeyError as error:
        raise UserError(f"{file}: {error} is missing; expected a point cloud") from None
    if "red" in columns:
        colours = np.stack([np.asarray(columns[key], np.float32) / 255 for key in ("red", "green", "blue")], 1)
    else:
        colours = np.full_like(points, 0.5)
    return torch.from_numpy(points), torch.from_numpy(colours)


# COLMAP --------------------------------------------------------------------------------------------------------------


def _colmap_files(folder: Path) -> bool:
    return any(
        (folder / f"cameras.{kind}").is_file() and (folder / f"images.{kind}").is_file() for kind in ("bin", "txt")
    )


def _colmap(folder: Path, sparse: Path, options: PicturesConfig) -> Iterator[Photo]:
    """COLMAP's registered pictures, by name."""
    binary = (sparse / "cameras.bin").is_file() and (sparse / "images.bin").is_file()
    file = sparse / ("images.bin" if binary else "images.txt")
    try:
        lenses = dict(_cameras_bin(sparse / "cameras.bin") if binary else _cameras_txt(sparse / "cameras.txt"))
        poses = sorted(_images_bin(file) if binary else _images_txt(file))
    except (struct.error, ValueError, IndexError, UnicodeDecodeError) as error:
        raise UserError(f"{sparse}: cameras or images are damaged ({error}); run COLMAP's mapper again") from None
    from scenesplat.gaussians import rotations

    for name, camera, quaternion, shift in poses:
        if camera not in lenses:
            raise UserError(f"{file}: {name} has camera {camera}, which cameras.{file.suffix[1:]} lacks")
        world_44 = torch.eye(4, dtype=torch.float64)
        world_44[:3, :3] = rotations(torch.tensor([quaternion], dtype=torch.float64))[0]
        world_44[:3, 3] = torch.tensor(shift, dtype=torch.float64)
        place = folder / "images" / name
        if not place.is_file():
            raise UserError(f"{place}: no such file; {file.name} names it, expected COLMAP's pictures in images/")
        yield _photo(name, place, world_44, lenses[camera], options)


def _colmap_lens(model: str, width: float, height: float, numbers: list[float], file: Path) -> dict[str, float]:
    if model not in PLAIN:
        raise UserError(f"{file}: camera model {model} is not read; make pinholes of it with {UNDISTORT}")
    lens = dict(zip(MODELS[model][1].split(), numbers, strict=True))
    if "f" in lens:
        lens["fx"] = lens["fy"] = lens.pop("f")
    return {**lens, "w": width, "h": height}


def _cameras_bin(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    names = {number: name for name, (number, _) in MODELS.items()}
    with path.open("rb") as file:
        for _ in range(_take(file, "<Q")[0]):
            number, model, width, height = _take(file, "<iiQQ")
            if model not in names:
                raise UserError(f"{path}: camera model number {model} is not known")
            numbers = _take(file, f"<{len(MODELS[names[model]][1].split())}d")
            yield number, _colmap_lens(names[model], width, height, list(numbers), path)


def _cameras_txt(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    for line in path.read_text().splitlines():
        words = line.split()
        if words and not line.startswith("#"):
            numbers = [float(word) for word in words[4:]]
            yield int(words[0]), _colmap_lens(words[1], float(words[2]), float(words[3]), numbers, path)


Pose = tuple[str, int, list[float], list[float]]


def _images_bin(path: Path) -> Iterator[Pose]:
    with path.open("rb") as file:
        for _ in range(_take(file, "<Q")[0]):
            _, *pose, camera = _take(file, "<i7di")
            letters = bytearray()
            while (letter := file.read(1)) not in (b"\0", b""):
                letters += letter
            file.seek(24 * _take(file, "<Q")[0], 1)
            yield letters.decode(), camera, list(pose[:4]), list(pose[4:])


def _images_txt(path: Path) -> Iterator[Pose]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    for line in lines[::2]:  # between them are the points of each picture
        words = line.split()
        if words:
            yield " ".join(words[9:]), int(words[8]), [float(w) for w in words[1:5]], [float(w) for w in words[5:8]]


def _colmap_points(sparse: Path) -> tuple[Tensor, Tensor]:
    """COLMAP's points and their colours."""
    rows: list[tuple[float, ...]] = []
    binary, text = sparse / "points3D.bin", sparse / "points3D.txt"
    try:
        if binary.is_file():
            with binary.open("rb") as file:
                for _ in range(_take(file, "<Q")[0]):
                    rows.append(_take(file, "<Q3d3Bd")[1:7])
                    file.seek(8 * _take(file, "<Q")[0], 1)
        elif text.is_file():
            lines = (line.split() for line in text.read_text().splitlines() if line.strip() and line[0] != "#")
            rows = [tuple(float(word) for word in words[1:7]) for words in lines]
    except (struct.error, ValueError) as error:
        raise UserError(f"{sparse}: points3D is damaged ({error}); run COLMAP's mapper again") from None
    if not rows:
        warnings.warn(f"{sparse}: no points3D: the fit starts from random places", stacklevel=2)
    table_Q6 = torch.tensor(rows, dtype=torch.float64).view(-1, 6).float()
    return table_Q6[:, :3], table_Q6[:, 3:] / 255


def _take(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))
