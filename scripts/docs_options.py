"""An extension of Griffe for the reference: the help of an option is the description of its field."""

import ast
from typing import Any

import griffe


class OptionHelp(griffe.Extension):
    """Give each field of a data class the ``help`` of its metadata as docstring."""

    def on_attribute_instance(self, *, node: ast.AST | griffe.ObjectNode, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Read the help of a field.

        Args:
            node: the assignment in the source.
            attr: the field as Griffe found it.
            **kwargs: what other extensions read.
        """
        value = node.value if isinstance(node, ast.AnnAssign) else None
        if attr.docstring or not isinstance(value, ast.Call):
            return
        for keyword in value.keywords:
            if keyword.arg == "metadata" and isinstance(keyword.value, ast.Dict):
                for key, text in zip(keyword.value.keys, keyword.value.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "help" and (words := constant_text(text)):
                        attr.docstring = griffe.Docstring(words, parent=attr)


def constant_text(node: ast.expr) -> str:
    """The text of a constant, or of the constant parts of an f-string; empty for anything else."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return ""
