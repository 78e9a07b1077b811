"""A forward problem as one block on the tape of firedrake.adjoint."""

from firedrake import Cofunction
from pyadjoint import Block, get_working_tape, stop_annotating

from fem_diffusion.fields.coefficients import coefficients
from fem_diffusion.forward.blocks import write

__all__ = ["recorded"]


class _ForwardBlock(Block):
    """The map from parameter to state; its adjoint is `sensitivity` with one row."""

    def __init__(self, problem, m):
        super().__init__()
        self.problem = problem
        self.add_dependency(m)

    def recompute_component(self, inputs, block_variable, idx, prepared):
        """The state for a new parameter."""
        with stop_annotating():
            return self.problem(inputs[0])

    def evaluate_adj_component(self, inputs, adj_inputs, block_variable, idx, prepared=None):
        """The derivative with respect to the parameter."""
        row = coefficients(adj_inputs[0])[None]
        gradient = Cofunction(self.problem.M.dual())
        write(gradient, self.problem.sensitivity(inputs[0], row)[0])
        return gradient


def recorded(problem, m):
    """Solve and record it as one block.

    Parameters
    ----------
    problem : AdvectionDiffusion or TransientAdvectionDiffusion
        It is called without annotation; its ``sensitivity`` is the adjoint. Second derivatives are not recorded.
    m : Function
        Parameter.

    Returns
    -------
    Function
        The state.
    """
    with stop_annotating():
        state = problem(m)
    block = _ForwardBlock(problem, m)
    get_working_tape().add_block(block)
    block.add_output(state.create_block_variable())
    return state
