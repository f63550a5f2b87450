"""The compiled modules are the ones that run, and are what their .pyi files and twins say."""

from __future__ import annotations

import ast
import copy
import importlib.machinery
import inspect
import pickle
from pathlib import Path
from types import ModuleType

import pytest

from mlxd import step
from mlxd._ext import block_table, hashed_tokens, prefix_index, sse
from tests.reference import block_table as block_table_twin
from tests.reference import hashed_tokens as hashed_tokens_twin
from tests.reference import prefix_index as prefix_index_twin
from tests.reference import sse as sse_twin

modules = pytest.mark.parametrize(
    "module, twin",
    [
        (block_table, block_table_twin),
        (hashed_tokens, hashed_tokens_twin),
        (prefix_index, prefix_index_twin),
        (sse, sse_twin),
    ],
    ids=["block_table", "hashed_tokens", "prefix_index", "sse"],
)
# No twin counts objects.
WITHOUT_TWIN = {"live_objects"}


def stub_of(module: ModuleType) -> ast.Module:
    name = module.__name__.rpartition(".")[2]
    return ast.parse(Path(module.__file__).with_name(f"{name}.pyi").read_text())


def public_names(module: ModuleType) -> set[str]:
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", module.__name__) == module.__name__
        if not isinstance(value, ModuleType)
    }


def parameters(function: ast.FunctionDef) -> list[tuple[str, str | None]]:
    """(name, default as source) of each parameter of a stub's function, without self and cls."""
    arguments = function.args
    assert not (arguments.posonlyargs or arguments.kwonlyargs or arguments.vararg or arguments.kwarg)
    defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + arguments.defaults
    return [
        (argument.arg, default and ast.unparse(default))
        for argument, default in zip(arguments.args, defaults, strict=True)
        if argument.arg not in ("self", "cls")
    ]


def runtime_parameters(function: object) -> list[tuple[str, str | None]]:
    return [
        (name, None if parameter.default is parameter.empty else repr(parameter.default))
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self"
    ]


@modules
def test_the_compiled_module_is_loaded(module: ModuleType, twin: ModuleType) -> None:
    assert module.__file__.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))
    assert Path(module.__file__).parent.name == "_ext"
    assert Path(twin.__file__).parts[-3:-1] == ("tests", "reference")


@modules
def test_the_stub_has_the_public_names(module: ModuleType, twin: ModuleType) -> None:
    declared = set()
    for node in stub_of(module).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            declared.add(node.name)
        elif isinstance(node, ast.AnnAssign):
            declared.add(node.target.id)
    assert {name for name in declared if not name.startswith("_")} == public_names(module)
    assert public_names(module) - WITHOUT_TWIN <= set(vars(twin))


@modules
def test_the_stub_has_the_signatures(module: ModuleType, twin: ModuleType) -> None:
    for node in stub_of(module).body:
        if isinstance(node, ast.FunctionDef):
            assert runtime_parameters(getattr(module, node.name)) == parameters(node)
            if node.name not in WITHOUT_TWIN:
                assert runtime_parameters(getattr(twin, node.name)) == parameters(node)


@modules
def test_the_stub_has_the_members(module: ModuleType, twin: ModuleType) -> None:
    for stub in stub_of(module).body:
        if not isinstance(stub, ast.ClassDef):
            continue
        cls, twin_class = getattr(module, stub.name), getattr(twin, stub.name)
        assert {name for name in vars(cls) if not name.startswith("_")} | {"__new__"} == {
            member.name for member in stub.body
        }
        for member in stub.body:
            if member.decorator_list:
                assert inspect.isdatadescriptor(vars(cls)[member.name])
            elif member.name == "__new__":
                # Cython gives constructors no signature; calling one by keyword shows its parameters.
                assert runtime_parameters(twin_class) == parameters(member)
                with pytest.raises(TypeError, match="positional argument"):
                    cls()
                with pytest.raises(TypeError, match="keyword argument"):
                    cls(**{name: None for name, _ in parameters(member)}, other=None)
            else:
                assert runtime_parameters(vars(cls)[member.name]) == parameters(member)
                assert runtime_parameters(vars(twin_class)[member.name]) == parameters(member)


def test_constructors_take_the_stubs_keywords() -> None:
    pool = block_table.BlockPool(num_blocks=3, block_size=2)
    tables = block_table.BlockTables(pool=pool, max_num_seqs=4, max_blocks_per_seq=5)
    assert (pool.num_blocks, pool.block_size, pool.num_free, pool.num_used) == (3, 2, 2, 0)
    assert (tables.pool, tables.max_num_seqs, tables.max_blocks_per_seq) == (pool, 4, 5)
    index = prefix_index.PrefixIndex(tables=tables)
    assert (index.tables, index.num_cached, index.num_evictable) == (tables, 0, 0)
    tokens = hashed_tokens.HashedTokens(block_size=2, salt=b"\0" * 16)
    assert (tokens.block_size, tokens.num_tokens, tokens.num_blocks) == (2, 0, 0)
    assert sse.TextFrame(prefix=b"<", suffix=b">").encode("-") == b"data: <->\n\n"


def test_objects_that_own_memory_are_not_copied() -> None:
    pool = block_table.BlockPool(3, 2)
    tables = block_table.BlockTables(pool, 1, 1)
    tokens = hashed_tokens.HashedTokens(2, b"\0" * 16)
    for each in (pool, tables, prefix_index.PrefixIndex(tables), tokens, sse.TextFrame(b"", b"")):
        with pytest.raises(TypeError):
            copy.copy(each)
        with pytest.raises(TypeError):
            pickle.dumps(each)


def test_the_null_block_is_the_step_contracts() -> None:
    pool = block_table.BlockPool(step.NULL_BLOCK + 3, 1)
    assert step.NULL_BLOCK not in pool.allocate(2)
    assert pool.allocate(1) is None
    assert block_table_twin.NULL_BLOCK == step.NULL_BLOCK
