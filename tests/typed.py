"""Check the types of our packages while tests run, for a fraction of what jaxtyping's decorator costs."""

import dataclasses
import functools
import inspect
import typing

import jaxtyping
from beartype import BeartypeConf, beartype

PACKAGES = ("contrastive", "memory_bank", "eval")
_jaxtyped = jaxtyping.jaxtyped
_check = beartype(conf=BeartypeConf(violation_type=TypeError))  # as jaxtyping's own error is


def install(packages=PACKAGES):
    """Decorate every function of ``packages`` when it is imported: call before the first import of them.

    jaxtyping's decorator binds each call's arguments to the signature, checks them twice and opens a scope
    for the names of axes, also where no array is annotated. Here beartype checks each call once, and only
    functions of arrays open a scope. Generators keep jaxtyping's decorator: beartype checks their arguments
    when the first value is asked for, where another function's scope is open.
    """
    jaxtyping.jaxtyped = _typed
    return jaxtyping.install_import_hook(packages, "beartype.beartype")


def _typed(thing=None, *, typechecker):
    if thing is None:
        return functools.partial(_typed, typechecker=typechecker)
    if inspect.isclass(thing):
        if dataclasses.is_dataclass(thing) and "__init__" in vars(thing):
            thing.__init__ = _typed(thing.__init__, typechecker=typechecker)
        return thing
    if not any(map(_is_of_arrays, thing.__annotations__.values())):
        return _check(thing)
    if inspect.isgeneratorfunction(thing):
        return _jaxtyped(thing, typechecker=typechecker)
    return _in_scope(_check(thing))


def _in_scope(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        __tracebackhide__ = True
        with _jaxtyped("context"):
            return function(*args, **kwargs)

    return call


def _is_of_arrays(hint):
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(_is_of_arrays, typing.get_args(hint)))
