"""What a student starts as, and the stacked U-Net with the parameter count of InstaFlow-1.7B."""

from __future__ import annotations

import pytest
import torch

from common.costs import parameter_count
from common.errors import UserError
from common.stable_diffusion import stable_diffusion_unet
from instaflow.flow import TeacherFlow, UNetFlow, network_time
from instaflow.student import StackedUNet, make_student, stack
from tests.common.tiny_teacher import tiny_teacher

X, T, STATES = torch.randn(2, 4, 8, 8), torch.tensor([0.0, 0.6]), torch.randn(2, 6, 16)


def test_the_wrapped_student_is_the_teachers_flow() -> None:
    teacher = tiny_teacher("v_prediction")
    with torch.no_grad():
        assert torch.equal(make_student(teacher, "wrapped")(X, T, STATES), TeacherFlow(teacher)(X, T, STATES))


def test_raw_takes_the_output_for_the_velocity_and_negate_flips_it() -> None:
    teacher = tiny_teacher("epsilon")
    with torch.no_grad():
        output = teacher.unet(X, network_time(T), STATES).sample
        assert torch.equal(make_student(teacher, "raw")(X, T, STATES), output)
        assert torch.equal(make_student(teacher, "negate")(X, T, STATES), -output)


def test_the_student_is_a_trainable_copy() -> None:
    teacher = tiny_teacher()
    student = make_student(teacher, "raw")
    assert all(parameter.requires_grad for parameter in student.parameters())
    before = teacher.unet.conv_in.weight.clone()
    with torch.no_grad():
        student.unet.conv_in.weight.add_(1)
    assert torch.equal(teacher.unet.conv_in.weight, before)


def test_unknown_or_pointless_initialisations_are_refused() -> None:
    with pytest.raises(UserError, match="raw, negate, wrapped"):
        make_student(tiny_teacher(), "fresh")
    with pytest.raises(UserError, match="points to the data already"):
        make_student(tiny_teacher("sample"), "negate")


def test_the_stacked_stable_diffusion_unet_has_1_719_017_924_parameters() -> None:
    with torch.device("meta"):
        first, second = stable_diffusion_unet(), stable_diffusion_unet()
        assert parameter_count(first) == 859_520_964
        # InstaFlow-1.7B (appendix B, our reading): two of them, without the first head and second stem.
        stacked = 2 * 859_520_964 - (640 + 11_524) - 11_840
        assert parameter_count(StackedUNet(first, second)) == stacked == 1_719_017_924


@pytest.mark.parametrize("pruning", ["none", "drop_out_in"])
def test_a_stack_trains_both_halves(pruning: str) -> None:
    flow = stack(make_student(tiny_teacher(), "negate"), pruning)
    flow(X, T, STATES).square().mean().backward()
    assert isinstance(flow.unet, StackedUNet)
    for half in (flow.unet.first, flow.unet.second):
        assert float(half.mid_block.resnets[0].conv1.weight.grad.abs().max()) > 0


def test_a_stack_without_pruning_is_two_networks_in_series() -> None:
    student = make_student(tiny_teacher(), "raw")
    time = network_time(T)
    with torch.no_grad():
        between = student.unet(X, time, STATES).sample
        assert torch.equal(stack(student, "none")(X, T, STATES), student.unet(between, time, STATES).sample)


@pytest.mark.parametrize("pruning", ["none", "drop_out_in"])
def test_shared_weights_give_the_same_depth_at_the_size_of_one_network(pruning: str) -> None:
    student = make_student(tiny_teacher(), "negate")
    shared, separate = stack(student, pruning, shared=True), stack(student, pruning)
    assert parameter_count(shared) == parameter_count(student)
    with torch.no_grad():
        torch.testing.assert_close(shared(X, T, STATES), separate(X, T, STATES))


def test_stacks_of_what_cannot_be_stacked_are_refused() -> None:
    student = make_student(tiny_teacher(), "raw")
    with pytest.raises(UserError, match="cannot be wrapped"):
        stack(make_student(tiny_teacher(), "wrapped"))
    with pytest.raises(UserError, match="already"):
        stack(stack(student))
    with pytest.raises(UserError, match="none, drop_out_in"):
        StackedUNet(student.unet, student.unet, "middle")
    assert isinstance(student, UNetFlow)
