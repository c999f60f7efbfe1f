"""Cut the bodies of functions out of a module, and put others in.

An exercise is a hole in a real module: the signature and the docstring stay, the body goes. A
student's body is put back by name, so that nothing else in the student's file counts. All of it
works on lines, with positions from Python's own parser, so comments and layout stay as they are.
"""

from __future__ import annotations

import ast
import textwrap

Function = ast.FunctionDef


def find_function(source: str, name: str) -> Function:
    """The function called name ("rotate", "Attention.attend") in the source of a module.

    Raises ValueError if there is none, and SyntaxError if the source is not Python.
    """
    node = ast.parse(source)
    for part in name.split("."):
        inside = [n for n in node.body if isinstance(n, (ast.ClassDef, Function))]
        found = [n for n in inside if n.name == part]
        if not found:
            raise ValueError(f"there is no function {name}")
        node = found[-1]
    if not isinstance(node, Function):
        raise ValueError(f"{name} is a class, not a function")
    return node


def has_docstring(node: Function) -> bool:
    return ast.get_docstring(node) is not None


def statements(node: Function) -> list[ast.stmt]:
    """The body of a function without its docstring."""
    return node.body[1:] if has_docstring(node) else node.body


def body_range(node: Function) -> tuple[int, int]:
    """Lines (first, last + 1), counted from 0, of the body behind the docstring."""
    if has_docstring(node):
        return node.body[0].end_lineno, node.end_lineno
    return node.body[0].lineno - 1, node.end_lineno


def plain_code(source: str, name: str) -> str:
    """The body of a function without its docstring, its comments and its layout."""
    return "\n".join(
        ast.unparse(statement) for statement in statements(find_function(source, name))
    )


def take_body(source: str, name: str) -> str:
    """The body of a function without its docstring, not indented."""
    node = find_function(source, name)
    lines = source.splitlines()
    for statement in statements(node)[:1]:
        if lines[statement.lineno - 1][: statement.col_offset].strip():  # shares a line
            return plain_code(source, name) + "\n"
    first, last = body_range(node)
    return textwrap.dedent("\n".join(lines[first:last])) + "\n"


def put_body(source: str, name: str, body: str) -> str:
    """The source with another body (not indented) in a function that has a docstring."""
    node = find_function(source, name)
    if not has_docstring(node):
        raise ValueError(f"{name} has no docstring, which every exercise needs")
    first, last = body_range(node)
    indent = " " * (node.col_offset + 4)
    lines = source.splitlines()
    lines[first:last] = textwrap.indent(body.rstrip("\n"), indent).splitlines()
    return "\n".join(lines) + "\n"


def is_open(source: str, name: str) -> bool:
    """True if the function still raises NotImplementedError and does nothing else."""
    body = statements(find_function(source, name))
    if len(body) != 1 or not isinstance(body[0], ast.Raise):
        return False
    return "NotImplementedError" in ast.unparse(body[0])


def edit(source: str, name: str, old: str, new: str) -> str:
    """The source with the text old replaced by new inside one function.

    Raises ValueError if old does not stand there exactly once.
    """
    body = take_body(source, name)
    if body.count(old) != 1:
        raise ValueError(f"{old!r} stands {body.count(old)} times in {name}; it must stand once")
    return put_body(source, name, body.replace(old, new))
