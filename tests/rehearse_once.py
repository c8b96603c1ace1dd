"""What a policy keeps in training, found once a process for policies that are alike: it is said at every start, and a
sixth of what a small training in a test takes.

Alike are policies of one class whose modules have the same plain attributes and whose tensors have the same shapes and
types, on batches of the same form. What couldn't be known isn't remembered.
"""

from __future__ import annotations

from opentau_train.distributed.rehearsal import Rehearsal

_activations, _states = Rehearsal.activations, Rehearsal.optimizer_states
_known = {}
PLAIN = (int, float, str, bool, type(None))


def plain(value) -> bool:
    if isinstance(value, dict):
        return all(map(plain, (*value, *value.values())))
    return all(map(plain, value)) if isinstance(value, (list, tuple)) else isinstance(value, PLAIN)


def likeness(rehearsal: Rehearsal) -> tuple:
    """What tells one rehearsal's answers from another's."""
    policy = rehearsal.policy
    modules = tuple(
        (name, type(module), repr([(k, v) for k, v in sorted(vars(module).items()) if plain(v)]), module.extra_repr())
        for name, module in policy.named_modules()
    )
    tensors = tuple(
        (name, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad)
        for name, tensor in (*policy.named_parameters(), *policy.named_buffers())
    )
    return modules, tensors, repr(rehearsal._spec), rehearsal._device


def remembered(ask, asked):
    """`ask` of a rehearsal, answered once for all that are alike; `asked` makes the question of its arguments."""

    def answer(self, *arguments):
        key = ask.__name__, likeness(self), asked(*arguments)
        if key in _known:
            return _known[key]
        found, noted = ask(self, *arguments), len(self.notes)
        if not noted:
            _known[key] = found
        return found

    return answer


def remember() -> None:
    Rehearsal.activations = remembered(_activations, lambda *arguments: arguments)
    Rehearsal.optimizer_states = remembered(_states, repr)


def forget() -> None:
    """Rehearse each policy anew."""
    Rehearsal.activations, Rehearsal.optimizer_states = _activations, _states
