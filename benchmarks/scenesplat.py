"""SceneSplat without CUDA extensions: each of its parts beside what users would run instead, on one machine.

    python -m benchmarks.scenesplat                        # writes results/bench_scenesplat.json; some five minutes
    python -m benchmarks.scenesplat --sizes codes neighbours --rounds 3
    python -m benchmarks.scenesplat --sizes tiny --rounds 1 --steps 1

render       forward and backward of 20,000 Gaussians at 320 x 240, against gsplat's own pure-torch functions (where it
             is installed: pip install gsplat==1.5.3) and every Gaussian of a tile times every pixel, kept for the
             backward pass; `render_tiles`: against the latter with projection and tiles as we find them
fit          a step of a fit (picture, L1 and SSIM, backward, Adam) of 10,000 Gaussians at 160 x 120, in Gaussians times
             pixels a second, against the same two peers: `fit` and `fit_tiles`
convolution  a convolution of 3^3 over 100,000 voxels, its neighbour search included, against spconv's CPU wheel, where
             that is installed (pip install spconv)
codes, neighbours, sampling   of 100,000 Gaussians, against the plain numpy form
forward      the language model with a quarter of its widths on 100,000 Gaussians, beside the matrix peak
lifting      a room's labels by rendering, teacher and Occam's lifting, against one pass of the default run's network
query, query_large   query.py from its start to its first answer, on 100,000 and on a million Gaussians of rooms side by
             side, against what a person waits for: 10 s, and 60 s and 6 GB
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.arms import (
    Pace,
    Step,
    Timing,
    Turns,
    bench_parser,
    leaner,
    matmul,
    measure,
    noted,
    of_the_peak,
    parse,
    take_turns,
    where_of,
)
from common.cpu import tune_allocator
from common.errors import run_main
from common.ledger import bench_row
from common.paths import REPOSITORY
from scenesplat.config import NetworkConfig
from scenesplat.model import PointTransformer, SparseConv
from scenesplat.plan import forward_flop
from scenesplat.serialization import ORDERS, depth_of, encode_all
from scenesplat.structure import Structure, neighbours_of

PARTS = {
    "render": (20_000, 5.0, "images/s"),
    "render_tiles": (20_000, 5.0, "images/s"),
    "fit": (10_000, 5.0, "Gaussian pixels/s"),
    "fit_tiles": (10_000, 5.0, "Gaussian pixels/s"),
    "convolution": (100_000, 1.0, "passes/s"),
    "codes": (100_000, 3.0, "scenes/s"),
    "neighbours": (100_000, 3.0, "scenes/s"),
    "sampling": (100_000, 3.0, "scenes/s"),
    "forward": (100_000, None, "scenes/s"),
    "lifting": (0, 10.0, "rooms/s"),
    "query": (100_000, 1.0, "s"),
    "query_large": (1_000_000, 1.0, "s"),
}
LIMITS = {"query": (10.0, None), "query_large": (60.0, 6e9)}  # seconds and bytes
TINY = 400  # Gaussians of every part, to try the program
SIZE = (320, 240)
FIT_SIZE = (160, 120)
NETWORK = NetworkConfig(
    enc_channels=[16, 32, 64, 128],
    enc_heads=[2, 2, 4, 8],
    dec_channels=[192, 128, 64],
    dec_heads=[4, 4, 4],
    drop_path=0.0,
)


@dataclass(frozen=True)
class Arm:
    side: str
    part: str
    device: str
    count: int


def walls(count: int) -> Tensor:
    """Occupied voxels [count, 3] on the surfaces of a cube: as dense as a room's."""
    torch.manual_seed(0)
    side = max(4, int((count / 4) ** 0.5))
    places = torch.rand(3 * count, 3) * side
    face = torch.randint(6, (len(places),))
    for axis in range(3):
        places[face == 2 * axis, axis] = 0
        places[face == 2 * axis + 1, axis] = side - 1
    grid = places.floor().long().unique(dim=0)
    return grid[torch.randperm(len(grid))[:count]]


def cloud(count: int) -> Any:
    """Gaussians in front of a camera."""
    from scenesplat.gaussians import Gaussians

    torch.manual_seed(0)
    means = torch.randn(count, 3) * torch.tensor([1.2, 0.9, 0.8]) + torch.tensor([0, 0, 4.0])
    return Gaussians(
        means, torch.randn(count, 3) * 0.3 - 4, torch.randn(count, 4), torch.randn(count), torch.randn(count, 3)
    )


def camera(size: tuple[int, int] = SIZE) -> Any:
    from scenesplat.rasterize import Camera

    return Camera.looking(torch.zeros(3), torch.tensor([0, 1e-3, 1.0]), *size, view=60.0)


# Ours ----------------------------------------------------------------------------------------------------------------


def our_render(arm: Arm) -> Step:
    from scenesplat.rasterize import render

    scene, view = cloud(arm.count).to(arm.device), camera()
    view = replace(view, world_44=view.world_44.to(arm.device), intrinsics_33=view.intrinsics_33.to(arm.device))
    leaves = [scene.means_N3, scene.scales_N3, scene.opacities_N, scene.colours_NC]

    def step(_: int) -> None:
        for leaf in leaves:
            leaf.requires_grad_(True).grad = None
        render(scene, view).rgb_HW3.square().mean().backward()

    return step


def fit_step(arm: Arm, draw: Callable[[Any, Any], Tensor]) -> Step:
    """A step of a fit; `draw` gives the picture [H, W, 3] of Gaussians and a camera."""
    from scenesplat.fitting import similarity

    scene, view = cloud(arm.count).to(arm.device), camera(FIT_SIZE)
    view = replace(view, world_44=view.world_44.to(arm.device), intrinsics_33=view.intrinsics_33.to(arm.device))
    leaves = [scene.means_N3, scene.scales_N3, scene.quaternions_N4, scene.opacities_N, scene.colours_NC]
    adam = torch.optim.Adam([leaf.requires_grad_(True) for leaf in leaves], 1e-4)
    target = torch.rand(FIT_SIZE[1], FIT_SIZE[0], 3, device=arm.device)

    def step(_: int) -> None:
        adam.zero_grad(set_to_none=True)
        picture = draw(scene, view)
        loss = 0.8 * (picture - target).abs().mean() + 0.2 * (1 - similarity(picture, target))
        loss.backward()
        adam.step()

    return step


def our_fit(arm: Arm) -> Step:
    from scenesplat.rasterize import render

    return fit_step(arm, lambda scene, view: render(scene, view).rgb_HW3)


def our_convolution(arm: Arm, backend: str = "gather") -> Step:
    grid = walls(arm.count).to(arm.device)
    module = SparseConv(32, 32, 3, True, backend).to(arm.device)
    x = torch.randn(len(grid), 32, device=arm.device)
    ends = torch.tensor([len(grid)])
    once = Structure.of(grid, ends, ["z"], []).levels[0]

    @torch.inference_mode()
    def step(_: int) -> None:  # the library finds its neighbours itself, and needs no curve
        module(x, Structure.of(grid, ends, ["z"], []).levels[0] if backend == "gather" else once)

    return step


def our_codes(arm: Arm) -> Step:
    grid = walls(arm.count).to(arm.device)
    batch = torch.zeros(len(grid), dtype=torch.long, device=arm.device)
    depth = depth_of(grid)
    return lambda _: encode_all(grid, batch, depth, ORDERS)


def our_neighbours(arm: Arm) -> Step:
    grid = walls(arm.count).to(arm.device)
    batch = torch.zeros(len(grid), dtype=torch.long, device=arm.device)
    return lambda _: neighbours_of(grid, batch, 3)


def our_sampling(arm: Arm) -> Step:
    from scenesplat.voxels import fragments, voxels_of

    places = torch.rand(arm.count, 3) * 4

    def step(_: int) -> None:
        list(fragments(voxels_of(places, 0.1)[1], 8))

    return step


def our_forward(arm: Arm) -> Step:
    grid = walls(arm.count).to(arm.device)
    network = PointTransformer(NETWORK).eval().to(arm.device)
    x = torch.randn(len(grid), NETWORK.in_channels, device=arm.device)
    ends = torch.tensor([len(grid)])

    @torch.inference_mode()
    def step(_: int) -> None:
        network(x, network.structure(grid, ends))

    return step


# What users would run instead -----------------------------------------------------------------------------------------


def every_pair(
    means: Tensor,
    conics: Tensor,
    opacities: Tensor,
    colours: Tensor,
    owner: Tensor,
    starts: Tensor,
    size: tuple[int, int],
) -> Tensor:
    """A picture [H, W, 3] of every Gaussian of a tile times every pixel at once, as gsplat's torch path keeps it."""
    side, (width, height) = 16, size
    across, down = -(-width // side), -(-height // side)
    axis = torch.arange(side, device=means.device) + 0.5
    tiles = []
    for tile in range(across * down):
        rows = owner[starts[tile] : starts[tile + 1]]
        x, y = (tile % across) * side + axis, (tile // across) * side + axis
        pixels = torch.cartesian_prod(y, x).flip(1)
        d = means[rows, None] - pixels
        a, b, c = conics[rows].t()[..., None]
        alpha = opacities[rows, None] * torch.exp(-0.5 * (a * d[..., 0] ** 2 + c * d[..., 1] ** 2) - b * d.prod(-1))
        alpha = torch.where(alpha < 1 / 255, 0, alpha.clamp(max=0.999))
        light = torch.cumprod(1 - alpha, 0)
        weight = torch.cat([torch.ones_like(light[:1]), light[:-1]]) * alpha * (light > 1e-4)
        tiles.append(weight.t() @ colours[rows])
    rows = torch.stack(tiles).view(down, across, side, side, 3).transpose(1, 2)
    return rows.reshape(down * side, across * side, 3)[:height, :width]


def plain_picture(scene: Any, view: Any) -> Tensor:
    """Our projection and tiles, then every pair."""
    from scenesplat.rasterize import colours_from, covariances, project, tile_pairs

    size = view.width, view.height
    seen = project(scene.means_N3, covariances(scene.quaternions_N4, scene.scales_N3.exp()), view)
    with torch.no_grad():
        reach = seen.radii_N2.float()
        owner, starts = tile_pairs(seen.means_N2, reach, seen.depths_N, *size, 16)[:2]
    colours, opacities = colours_from(scene, view), scene.opacities_N.sigmoid()
    return every_pair(seen.means_N2, seen.conics_N3, opacities, colours, owner, starts, size)


def gsplat_picture(scene: Any, view: Any, own_tiles: bool) -> Tensor:
    """gsplat's projection, colours and, with `own_tiles`, tiles, in its own torch; then every pair."""
    from gsplat.cuda import _torch_impl as plain

    from scenesplat.rasterize import tile_pairs

    size = view.width, view.height
    covariances, _ = plain._quat_scale_to_covar_preci(scene.quaternions_N4, scene.scales_N3.exp(), True, False)
    world, lens = view.world_44[None], view.intrinsics_33[None]
    radii, means, depths, conics, _ = plain._fully_fused_projection(scene.means_N3, covariances, world, lens, *size)
    directions = scene.means_N3 - view.place_3
    colours = (plain._spherical_harmonics(scene.degree, directions, scene.harmonics_NK3) + 0.5).clamp(min=0)
    across, down = -(-size[0] // 16), -(-size[1] // 16)
    if own_tiles:
        _, numbers, owner = plain._isect_tiles(means.detach(), radii, depths.detach(), 16, across, down)
        begins = plain._isect_offset_encode(numbers, 1, across, down).flatten()
        starts = torch.cat([begins, begins.new_tensor([len(owner)])]).long()
    else:
        with torch.no_grad():
            owner, starts = tile_pairs(means[0], radii[0].float(), depths[0], *size, 16)[:2]
    return every_pair(means[0], conics[0], scene.opacities_N.sigmoid(), colours, owner.long(), starts, size)


def plain_render(arm: Arm, draw: Callable[[Any, Any], Tensor]) -> Step:
    """Forward and backward of a picture that `draw` gives."""
    scene, view = cloud(arm.count).to(arm.device), camera()
    view = replace(view, world_44=view.world_44.to(arm.device), intrinsics_33=view.intrinsics_33.to(arm.device))
    leaves = [scene.means_N3, scene.scales_N3, scene.opacities_N, scene.colours_NC]

    def step(_: int) -> None:
        for leaf in leaves:
            leaf.requires_grad_(True).grad = None
        draw(scene, view).square().mean().backward()

    return step


def plain_codes(arm: Arm) -> Step:
    """Skilling's algorithm, and bits interleaved one after the other, in numpy."""
    grid = walls(arm.count).numpy()
    depth = depth_of(torch.from_numpy(grid))

    def interleaved(x: NDArray) -> NDArray:
        code = np.zeros(len(x), np.int64)
        for bit in range(depth):
            for axis in range(3):
                code |= (x[:, axis] >> bit & 1) << 3 * bit + 2 - axis
        return code

    def hilbert(x: NDArray) -> NDArray:
        x = x.copy()
        for bit in range(depth - 1, 0, -1):
            low = (1 << bit) - 1
            for axis in range(3):
                on = (x[:, axis] >> bit & 1).astype(bool)
                x[on, 0] ^= low
                swap = (x[:, 0] ^ x[:, axis]) & low * ~on
                x[:, 0] ^= swap
                x[:, axis] ^= swap
        code = interleaved(x)
        for shift in (1, 2, 4, 8, 16, 32):
            code ^= code >> shift
        return code

    def step(_: int) -> None:
        for places in (grid, grid[:, [1, 0, 2]]):
            interleaved(places)
            hilbert(places)

    return step


def plain_neighbours(arm: Arm) -> Step:
    """One search for each of the 27 places."""
    grid = walls(arm.count).numpy()

    def step(_: int) -> None:
        moved = grid - grid.min(0) + 1
        spans = moved.max(0) + 2
        key = (moved[:, 0] * spans[1] + moved[:, 1]) * spans[2] + moved[:, 2]
        order = key.argsort(kind="stable")
        sorted_key = key[order]
        for place in range(27):
            d = np.array([place // 9, place // 3 % 3, place % 3]) - 1
            wanted = key + (d[0] * spans[1] + d[1]) * spans[2] + d[2]
            at = np.searchsorted(sorted_key, wanted).clip(max=len(key) - 1)
            rows = np.flatnonzero(sorted_key[at] == wanted)
            order[at[rows]]

    return step


def plain_sampling(arm: Arm) -> Step:
    """Voxels by unique rows, and each pass gathered voxel by voxel."""
    places = torch.rand(arm.count, 3).numpy() * 4

    def step(_: int) -> None:
        cells = np.floor((places - places.min(0)) / 0.1).astype(np.int64)
        voxel, counts = np.unique(cells, axis=0, return_inverse=True, return_counts=True)[1:]
        order = np.argsort(voxel, kind="stable")
        ends = np.cumsum(counts)
        for i in range(8):
            np.array([order[end - count + i % count] for end, count in zip(ends, counts)])

    return step


ARMS: dict[tuple[str, str], Callable[[Arm], Step]] = {
    ("ours", "render"): our_render,
    ("peer", "render"): lambda arm: plain_render(arm, lambda scene, view: gsplat_picture(scene, view, True)),
    ("ours", "render_tiles"): our_render,
    ("peer", "render_tiles"): lambda arm: plain_render(arm, plain_picture),
    ("ours", "fit"): our_fit,
    ("peer", "fit"): lambda arm: fit_step(arm, lambda scene, view: gsplat_picture(scene, view, True)),
    ("ours", "fit_tiles"): our_fit,
    ("peer", "fit_tiles"): lambda arm: fit_step(arm, lambda scene, view: gsplat_picture(scene, view, False)),
    ("ours", "convolution"): our_convolution,
    ("peer", "convolution"): lambda arm: our_convolution(arm, "spconv"),
    ("ours", "codes"): our_codes,
    ("peer", "codes"): plain_codes,
    ("ours", "neighbours"): our_neighbours,
    ("peer", "neighbours"): plain_neighbours,
    ("ours", "sampling"): our_sampling,
    ("peer", "sampling"): plain_sampling,
    ("ours", "forward"): our_forward,
}


def rate(name: str, part: str, count: int, ours: Timing, peer: Timing, target: float | None) -> dict[str, Any]:
    work = FIT_SIZE[0] * FIT_SIZE[1] * count if part.startswith("fit") else 1
    row = bench_row(name, work / ours.wall, work / peer.wall, PARTS[part][2], target=target)
    return noted(row, f"{torch.get_num_threads()} threads, CPU-time ratio {peer.cpu / ours.cpu:.2f}")


def part_rows(
    part: str, count: int, device: str, folder: Path, pace: Pace, target: float | None
) -> list[dict[str, Any]]:
    """The rows of a part."""
    what = f"{count:,} Gaussians"
    arm = Arm("ours", part, device, count)
    where = where_of(device)
    if part == "forward":
        arms = {"ours": arm, "peak": replace(arm, side="peak")}
        found = take_turns("benchmarks.scenesplat", arms, pace, 1, folder, steps={"ours": pace.steps, "peak": 4})
        flop = forward_flop(NETWORK, count)
        name = f"{where}share of the matmul peak, one pass of the network, fp32 ({what})"
        memory = f"{found['ours'].memory / 2**20:.0f} MiB at most, {found['ours'].wall:.2f} s"
        return [noted(of_the_peak(name, flop, found["ours"], found["peak"], device, pace.rounds), memory)]
    if part == "lifting":
        from scenesplat.experiments import lifting_against_passing

        timed = lifting_against_passing(pace.rounds)
        name = (
            f"{where}one pass of the network against lifting labels onto a room ({timed['gaussians']:,.0f} Gaussians)"
        )
        return [bench_row(name, 1 / timed["seconds_pass"], 1 / timed["seconds_lifting"], "rooms/s", target=target)]
    if part in LIMITS:
        return query_rows(part, count, folder, pace, target)
    if part == "convolution" and importlib.util.find_spec("spconv") is None:
        print("convolution is left out: spconv is not installed (pip install spconv)")
        return []
    if part in ("render", "fit", "fit_tiles") and importlib.util.find_spec("gsplat") is None:
        print(f"{part} is left out: gsplat is not installed (pip install gsplat==1.5.3)")
        return []
    found = take_turns("benchmarks.scenesplat", {"ours": arm, "peer": replace(arm, side="peer")}, pace, 1, folder)
    titles = {
        "render": "forward and backward of a picture, against gsplat's pure-torch functions as they are",
        "render_tiles": "forward and backward of a picture, against every Gaussian times every pixel of a tile",
        "fit": "a step of a fit, against gsplat's pure-torch functions as they are",
        "fit_tiles": "a step of a fit, against gsplat's pure-torch functions with our search of tiles",
        "convolution": "convolution of 3^3 with its neighbour search, against spconv's CPU wheel",
        "codes": "four curves, against bit by bit in numpy",
        "neighbours": "neighbours of 3^3, against one numpy search a place",
        "sampling": "grid sampling into 8 passes, against numpy voxel by voxel",
    }
    rows = [rate(f"{where}{titles[part]} ({what})", part, count, found["ours"], found["peer"], target)]
    if part.startswith("render"):
        peer = "gsplat's" if part == "render" else "every Gaussian times every pixel of a tile"
        name = f"{where}memory of a picture's forward and backward, against {peer} ({what})"
        rows.append(leaner(name, found["ours"], found["peer"], device, 2.0 if target else None))
    return rows


def house(count: int) -> Any:
    """Rooms of unseen furniture side by side, as many Gaussians as asked for."""
    from scenesplat.gaussians import joined
    from scenesplat.rooms import make_room

    density = 300.0 if count < 10_000 else 2_500.0
    found: list[Any] = []
    while sum(map(len, found)) < count:
        number = len(found)
        room = make_room(1_000_000 + number, "test", density).gaussians
        found.append(room.moved(torch.tensor([7.0 * (number % 4), 7.0 * (number // 4), 0.0])))
    whole = joined(found)
    return whole.select(torch.arange(count))


def query_rows(part: str, count: int, folder: Path, pace: Pace, target: float | None) -> list[dict[str, Any]]:
    """Wall time and memory of whole runs of query.py with the published model, beside their limits."""
    from scenesplat.ply import write_scene

    scene = folder / "house.ply"
    write_scene(scene, house(count))
    words = [sys.executable, "-m", "scenesplat.query", str(scene), "a chair"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(pace.threads)}
    walls, cpus, memory = [], [], 0
    for _ in range(pace.rounds):
        started = time.perf_counter()
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, cwd=REPOSITORY, env=environment)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"query.py ended with status {process.returncode}")
        walls.append(time.perf_counter() - started)
        cpus.append(used.ru_utime + used.ru_stime)
        memory = max(memory, used.ru_maxrss * 1024)
    limit, bytes_limit = LIMITS[part]
    what = f"({count:,} Gaussians)"
    note = f"median of {pace.rounds} starts, {pace.threads} threads, {statistics.median(cpus):.1f} CPU seconds"
    name = f"query.py from its start to its answer, against a limit of {limit:g} s {what}"
    row = bench_row(name, statistics.median(walls), limit, "s", target=target, higher_is_better=False)
    rows = [noted(row, note)]
    if bytes_limit:
        name = f"memory of query.py, against a limit of {bytes_limit / 1e9:g} GB {what}"
        row = bench_row(name, memory / 2**20, bytes_limit / 2**20, "MiB", target=target, higher_is_better=False)
        rows.append(noted(row, "peak resident memory of the whole process"))
    return rows


def parts(size: str, device: str, folder: Path, pace: Pace) -> Iterator[list[dict[str, Any]]]:
    """The rows of a part; `tiny`: of all, too small to say anything, without targets."""
    chosen = [part for part in PARTS if part != "lifting"] if size == "tiny" else [size]
    for part in chosen:
        count, target, _ = PARTS[part]
        if rows := part_rows(
            part, TINY if size == "tiny" else count, device, folder, pace, None if size == "tiny" else target
        ):
            yield rows


def serve(arm: Arm) -> None:
    """An arm's own process."""
    tune_allocator()
    turns = Turns(arm.device)
    turns.serve(matmul(arm.device, False) if arm.side == "peak" else ARMS[arm.side, arm.part](arm))


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = bench_parser(__doc__, "bench_scenesplat.json", {**PARTS, "tiny": None}, [*PARTS], steps=1)
    options = parse(parser, argv)
    if options.arm:
        serve(Arm(**options.arm))
        return []
    return measure(options, parts)


if __name__ == "__main__":
    run_main(main)
