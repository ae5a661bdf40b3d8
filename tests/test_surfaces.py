"""Surfaces against closed forms, one camera for all, and the mesh in TensorBoard's files."""

import numpy as np
import pytest
from conftest import TINY, make_set
from scipy.spatial import KDTree
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.mesh import plugin_data_pb2

import train_dtml
from evaluation.slices import COLOURS, LABEL, prediction_mesh
from evaluation.surfaces import Camera, Surface, camera_around, render, surface

ORANGE, GREEN = COLOURS[0], LABEL


def ball(shape: tuple[int, ...], centre, radius: float, spacing=(1.0, 1.0, 1.0)) -> np.ndarray:
    """The voxels of a ball; centre and radius in mm."""
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1) * np.array(spacing)
    return ((grid - np.array(centre)) ** 2).sum(-1) < radius**2


def volume_and_area(one: Surface) -> tuple[float, float]:
    """By the divergence theorem: positive only if the triangles face outwards."""
    a, b, c = (one.vertices[one.faces[:, i]].astype(float) for i in range(3))
    return (a * np.cross(b, c)).sum() / 6, np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2


# -- surfaces --


@pytest.mark.parametrize(
    ("spacing", "most"), [((1.0, 1.0, 1.0), 500), ((0.6, 0.8, 1.7), 3000), ((0.6, 0.8, 1.7), None)]
)
def test_a_ball_has_the_volume_and_the_area_of_a_ball(spacing, most):
    radius, centre = 14.0, (22.0, 20.0, 25.0)
    shape = tuple(int(48 / step) for step in spacing)
    one = surface(ball(shape, centre, radius, spacing), spacing, most)
    volume, area = volume_and_area(one)
    assert volume == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.1 if most == 500 else 0.04)
    assert area == pytest.approx(4 * np.pi * radius**2, rel=0.1 if most == 500 else 0.04)
    assert one.vertices.mean(axis=0) == pytest.approx(centre, abs=0.4)
    assert len(one.faces) <= (most or np.inf)
    outward = (one.vertices - centre) / np.linalg.norm(one.vertices - centre, axis=1, keepdims=True)
    assert np.median((outward * one.normals).sum(axis=1)) > 0.98


def test_a_surface_is_closed_even_at_the_edge_of_the_scan():
    one = surface(np.ones((29, 30, 31), bool))
    edges = np.sort(np.concatenate([one.faces[:, [0, 1]], one.faces[:, [1, 2]], one.faces[:, [2, 0]]]), axis=1)
    assert (np.unique(edges, axis=0, return_counts=True)[1] == 2).all()
    assert volume_and_area(one)[0] == pytest.approx(29 * 30 * 31, rel=0.03)


def test_a_single_voxel_and_nothing_at_all_have_a_surface():
    mask = np.zeros((6, 7, 8), bool)
    assert len(surface(mask).faces) == 0
    mask[2, 3, 4] = True
    assert surface(mask).vertices.mean(axis=0) == pytest.approx((2, 3, 4), abs=0.1)


# -- the camera --


def shown(masks: list[np.ndarray], camera: Camera, spacing=(1.0, 1.0, 1.0)) -> list[np.ndarray]:
    return [render([(surface(mask, spacing), ORANGE)], camera, 120) for mask in masks]


def test_one_camera_shows_sizes_and_places_as_they_are():
    shape = (60, 50, 40)
    large, small = ball(shape, (30, 25, 20), 16), ball(shape, (30, 25, 20), 8)
    camera = camera_around([large, small], (1, 1, 1), 30, 20)
    covered = [(picture[..., 3] > 127).sum() for picture in shown([large, small], camera)]
    assert covered[0] / covered[1] == pytest.approx(4, rel=0.05)
    assert covered[0] == pytest.approx(np.pi * (16 * 120 / camera.width) ** 2, rel=0.03)


@pytest.mark.parametrize(
    ("azimuth", "elevation", "right", "up"),
    [
        (0, 0, (1, 0, 0), (0, 0, 1)),
        (180, 0, (-1, 0, 0), (0, 0, 1)),
        (90, 0, (0, 1, 0), (0, 0, 1)),
        (0, 90, (1, 0, 0), (0, 1, 0)),
    ],
)
def test_where_the_camera_stands(azimuth, elevation, right, up):
    axes = Camera((0, 0, 0), 1, azimuth, elevation).axes
    assert axes[:2] == pytest.approx(np.array([right, up]), abs=1e-12)
    assert np.linalg.det(axes) == pytest.approx(1)  # no mirror
    shape = (40, 40, 40)
    camera = Camera((20, 20, 20), 40, azimuth, elevation)
    for direction, (row, column) in ((right, (60, 90)), (up, (30, 60))):
        (picture,) = shown([ball(shape, np.array([20, 20, 20]) + 10 * np.array(direction), 5)], camera)
        assert np.argwhere(picture[..., 3] > 127).mean(axis=0) == pytest.approx((row, column), abs=1.5)


def test_what_is_nearer_hides_what_is_behind():
    shape = (40, 40, 40)
    front, back = surface(ball(shape, (20, 8, 20), 6)), surface(ball(shape, (20, 30, 20), 12))
    for order in ([(front, ORANGE), (back, GREEN)], [(back, GREEN), (front, ORANGE)]):
        ahead, behind = (render(order, Camera((20, 20, 20), 40, a), 80)[40, 40, :3].astype(int) for a in (0, 180))
        assert ahead[0] > 1.5 * ahead[2] + 50 and behind[1] > behind[0] + 50  # orange; green


# -- TensorBoard --


def test_a_mesh_lies_beside_its_label_and_an_empty_one_is_harmless():
    label = ball((30, 30, 30), (15, 15, 15), 8).astype(np.uint8)
    mesh = prediction_mesh(label, label, (1, 1, 2))
    orange = (mesh["colours"] == (255, 176, 0)).all(axis=1)
    assert orange.sum() == (~orange).sum() - 1  # the first vertex belongs to no triangle
    assert mesh["vertices"][~orange][1:] - mesh["vertices"][orange] == pytest.approx(
        np.tile([31.5, 0, 0], (orange.sum(), 1)), abs=1e-4
    )
    empty = prediction_mesh(np.zeros_like(label), np.zeros_like(label), (1, 1, 1))
    assert {len(values) for values in empty.values()} == {1}


def test_a_run_s_event_file_holds_the_mesh_of_every_picture(tmp_path):
    data = make_set(tmp_path / "set")
    where = ["--data", str(data), "--runs", str(tmp_path), "--name", "run"]
    train_dtml.main([*where, *TINY, "--iterations", "4", "--picture-every", "2"])
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"tensors": 0}).Reload()
    result = {}
    for tag in events.Tags()["tensors"]:
        about = events.SummaryMetadata(tag).plugin_data
        if about.plugin_name == "mesh":
            kind = plugin_data_pb2.MeshPluginData.FromString(about.content)
            assert kind.name == "surface/labeled"
            result[kind.content_type] = [(e.step, e.tensor_proto) for e in events.Tensors(tag)]
    kinds = plugin_data_pb2.MeshPluginData
    assert set(result) == {kinds.VERTEX, kinds.FACE, kinds.COLOR}
    assert all([step for step, _ in one] == [1, 3] for one in result.values())
    from tensorboard.util.tensor_util import make_ndarray

    vertices, faces, colours = (
        make_ndarray(result[kind][-1][1])[0] for kind in (kinds.VERTEX, kinds.FACE, kinds.COLOR)
    )
    assert len(vertices) == len(colours) and faces.min() >= 0 and faces.max() < len(vertices) and len(faces) <= 12000
    green = vertices[(colours == (0, 208, 160)).all(axis=1)]
    # The label of the fixed crop, in mm: its voxels lie inside its surface, whose spacing (1,1,2) stretches z.
    assert np.ptp(green, axis=0)[2] == pytest.approx(np.ptp(green, axis=0)[0] * 2, rel=0.35)
    assert KDTree(green).query(green.mean(axis=0))[0] > 2
