"""The static pass: one function at a time, over the syntax tree, with light dataflow.

It runs nothing, so it also sees branches that no call reaches; and it knows only what the source says, so its
findings are ``suspect`` (``likely`` where the value is a tensor for sure). Positions, caches, flags and optimizer state
cannot be decided here: that is what ``pretend``, ``trace`` and ``tape`` are for.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from ostinato.check.finding import Certainty, Finding, Frame, Severity
from ostinato.check.rules import RULES
from ostinato.check.static import fallback
from ostinato.check.static import values as known
from ostinato.check.static.values import Value, join
from ostinato.errors import CheckError

_TENSOR_ANNOTATION = re.compile(r"\b(torch\.)?(Long|Float|Bool|Int|Byte|Half)?Tensor\b")
_CONTAINER_ANNOTATION = re.compile(r"\b(list|tuple|dict|List|Tuple|Dict|Sequence|Iterable|Callable|Mapping)\[")
_HOST_ANNOTATION = re.compile(r"^(Optional\[)?(int|float|bool|str)\b")
_HAZARDS = frozenset({"RNG_SEED", "DATA_PTR"})


def dotted(node: ast.expr) -> str:
    """``torch.nn.functional.pad`` of an attribute chain; a part that is no name is left out."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        parts.append(node.id)
    return ".".join(reversed(parts))


def _annotated(annotation: ast.expr | None) -> Value | None:
    if annotation is None:
        return None
    text = ast.unparse(annotation).strip("'\"")
    if _TENSOR_ANNOTATION.search(text) and not _CONTAINER_ANNOTATION.search(text):
        return Value.TENSOR
    return Value.HOST if _HOST_ANNOTATION.match(text) else Value.UNKNOWN


def _used_as_tensors(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Unannotated parameters that the body uses as tensors."""
    found: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if isinstance(owner, ast.Name) and node.func.attr in known.TENSOR_METHODS:
                found.add(owner.id)
            name = dotted(node.func)
            if name.split(".")[0] in ("torch", "F") and not name.startswith(known.NOT_TENSORS):
                found.update(a.id for a in node.args[:1] if isinstance(a, ast.Name))
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            found.update(side.id for side in (node.left, node.right) if isinstance(side, ast.Name))
        elif (
            isinstance(node, ast.Attribute)
            and node.attr in ("shape", "dtype", "device")
            and isinstance(node.value, ast.Name)
        ):
            found.add(node.value.id)
    return found - {"self", "cls", "config"}


class _Function:
    """Abstract interpretation of one function: statements in order, both sides of a branch."""

    def __init__(self, file: str, name: str, outer: dict[str, Value], found: list[Finding]) -> None:
        self.file = file
        self.name = name
        self.env = dict(outer)
        self.found = found

    def report(self, node: ast.AST, rule: str, message: str, certainty: Certainty = Certainty.LIKELY) -> None:
        """Add a finding at a node."""
        severity = Severity.HAZARD if rule in _HAZARDS else Severity.ERROR
        where = Frame(self.file, getattr(node, "lineno", 0), self.name)
        self.found.append(Finding(RULES[rule], severity, certainty, message, "source", where, "static", (where,)))

    # ------------------------------------------------------------------ expressions
    def value(self, node: ast.expr | None) -> Value:
        """The abstract value of an expression; reports what evaluating it would do."""
        if node is None:
            return Value.HOST
        method = getattr(self, f"_{type(node).__name__.lower()}", None)
        if method is not None:
            result: Value = method(node)
            return result
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.value(child)
        return Value.UNKNOWN

    def _constant(self, node: ast.Constant) -> Value:
        return Value.HOST

    def _name(self, node: ast.Name) -> Value:
        return self.env.get(node.id, Value.UNKNOWN)

    def _starred(self, node: ast.Starred) -> Value:
        return self.value(node.value)

    def _namedexpr(self, node: ast.NamedExpr) -> Value:
        value = self.value(node.value)
        self.env[node.target.id] = value
        return value

    def _attribute(self, node: ast.Attribute) -> Value:
        owner = self.value(node.value)
        if node.attr in known.HOST_ATTRIBUTES:
            return Value.HOST
        if owner.is_tensor and node.attr in known.TENSOR_ATTRIBUTES:
            return Value.TENSOR
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            return self.env.get(f"self.{node.attr}", Value.UNKNOWN)
        return Value.UNKNOWN

    def _binop(self, node: ast.BinOp) -> Value:
        left, right = self.value(node.left), self.value(node.right)
        if Value.MASK in (left, right) and isinstance(node.op, ast.BitAnd | ast.BitOr | ast.BitXor):
            return Value.MASK
        if isinstance(node.left, ast.Constant) and isinstance(node.left.value, str):
            return Value.HOST
        if left.is_tensor or right.is_tensor:
            return Value.TENSOR
        return Value.HOST if left is right is Value.HOST else Value.UNKNOWN

    def _unaryop(self, node: ast.UnaryOp) -> Value:
        value = self.value(node.operand)
        if isinstance(node.op, ast.Not):
            if value.is_tensor:
                self.report(node, "D2H_SYNC", "'not' reads the value of a tensor")
            return Value.HOST
        return value

    def _compare(self, node: ast.Compare) -> Value:
        values = [self.value(node.left), *map(self.value, node.comparators)]
        if all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
            return Value.HOST
        if any(isinstance(op, ast.In | ast.NotIn) for op in node.ops):
            if values[-1].is_tensor:
                self.report(node, "D2H_SYNC", "'in' reads every element of a tensor")
            return Value.HOST
        if any(isinstance(c, ast.Constant) and isinstance(c.value, str) for c in [node.left, *node.comparators]):
            return Value.HOST
        if any(v.is_tensor for v in values):
            if len(node.ops) > 1:
                self.report(node, "D2H_SYNC", "a chained comparison reads the value of a tensor")
            return Value.MASK
        return Value.HOST if all(v is Value.HOST for v in values) else Value.UNKNOWN

    def _boolop(self, node: ast.BoolOp) -> Value:
        values = [self.value(operand) for operand in node.values]
        for value, operand in zip(values[:-1], node.values[:-1], strict=True):
            if value.is_tensor:
                self.report(operand, "D2H_SYNC", "'and'/'or' read the value of a tensor")
        if values[-1].is_tensor:
            return values[-1]
        return Value.HOST if all(v is Value.HOST for v in values) else Value.UNKNOWN

    def _ifexp(self, node: ast.IfExp) -> Value:
        self.test(node.test)
        return join(self.value(node.body), self.value(node.orelse))

    def _tuple(self, node: ast.Tuple | ast.List) -> Value:
        values = [self.value(e) for e in node.elts]
        return Value.HOST if values and all(v is Value.HOST for v in values) else Value.UNKNOWN

    _list = _tuple

    def _joinedstr(self, node: ast.JoinedStr) -> Value:
        for part in node.values:
            if isinstance(part, ast.FormattedValue) and self.value(part.value).is_tensor:
                self.report(node, "D2H_SYNC", "an f-string formats the values of a tensor")
        return Value.HOST

    def _subscript(self, node: ast.Subscript) -> Value:
        owner = self.value(node.value)
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        for part in parts:
            if isinstance(part, ast.Slice):
                if any(b is not None and self.value(b).is_tensor for b in (part.lower, part.upper, part.step)):
                    self.report(node, "D2H_SYNC", "a slice bound is a tensor")
                continue
            index = self.value(part)
            if owner.is_tensor and index is Value.MASK and isinstance(node.ctx, ast.Load):
                self.report(node, "DYNAMIC_SHAPE", "reading with a boolean mask calls nonzero")
            elif owner.is_tensor and isinstance(part, ast.List):
                self.report(node, "H2D_PAGEABLE", "a list as index is copied to the device", Certainty.SUSPECT)
            elif owner is Value.HOST and index.is_tensor:
                self.report(node, "D2H_SYNC", "a host sequence is indexed by a tensor", Certainty.SUSPECT)
        if owner.is_tensor:
            return Value.MASK if owner is Value.MASK else Value.TENSOR
        return Value.HOST if owner is Value.HOST else Value.UNKNOWN

    def _lambda(self, node: ast.Lambda) -> Value:
        return Value.UNKNOWN

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> Value:
        for generator in node.generators:
            source = self.value(generator.iter)
            self.bind(generator.target, Value.TENSOR if source.is_tensor else Value.UNKNOWN, None)
            for condition in generator.ifs:
                self.test(condition)
        self.value(node.elt)
        return Value.UNKNOWN

    _listcomp = _setcomp = _generatorexp = _comprehension

    # ------------------------------------------------------------------ calls
    def _call(self, node: ast.Call) -> Value:
        name = dotted(node.func)
        values = [self.value(a) for a in node.args]
        keywords = {k.arg: self.value(k.value) for k in node.keywords}
        if isinstance(node.func, ast.Name):
            return self._builtin_call(node, name, values)
        last = name.split(".")[-1]
        if name in ("torch.cuda.synchronize", "torch.accelerator.synchronize"):
            self.report(node, "STREAM_SYNC", f"{name} waits for the device")
            return Value.HOST
        if name == "torch.cuda.empty_cache":
            self.report(node, "ALLOCATOR", name)
            return Value.HOST
        if name in ("torch.manual_seed", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all"):
            self.report(node, "RNG_SEED", name)
            return Value.HOST
        if name.split(".")[0] in ("np", "numpy") and any(v.is_tensor for v in values):
            self.report(node, "D2H_SYNC", "numpy reads a tensor")
            return Value.HOST
        if name.startswith(("torch.", "F.", "nn.functional.")):
            return self._torch_call(node, name, last, values, keywords)
        if isinstance(node.func, ast.Attribute):
            return self._method_call(node, node.func, name, values, keywords)
        return Value.UNKNOWN

    def _builtin_call(self, node: ast.Call, name: str, values: list[Value]) -> Value:
        if name in known.READING_BUILTINS:
            if values and values[0].is_tensor:
                if name in known.ITERATING_BUILTINS:
                    self.report(node, "D2H_SYNC", f"{name}() iterates over a tensor on the host", Certainty.SUSPECT)
                else:
                    self.report(node, "D2H_SYNC", f"{name}() reads the value of a tensor")
            return Value.HOST
        return Value.HOST if name in known.ASKING_BUILTINS else Value.UNKNOWN

    def _torch_call(
        self, node: ast.Call, name: str, last: str, values: list[Value], keywords: dict[str | None, Value]
    ) -> Value:
        if last in known.UPLOADS:
            device = next((k.value for k in node.keywords if k.arg == "device"), None)
            if device is not None and not (isinstance(device, ast.Constant) and device.value in ("cpu", "meta")):
                self.report(node, "H2D_PAGEABLE", f"{name} copies host data to the device", Certainty.SUSPECT)
                return Value.TENSOR
            return Value.UNKNOWN
        if name.startswith(known.NOT_TENSORS):
            return Value.UNKNOWN
        if last == "where" and len(values) == 1 and not keywords:
            self.report(node, "DYNAMIC_SHAPE", "where with one argument is nonzero")
        elif last == "repeat_interleave" and len(values) > 1 and values[1].is_tensor and "output_size" not in keywords:
            self.report(node, "DYNAMIC_SHAPE", "repeat_interleave with tensor repeats reads their sum")
        elif last == "one_hot" and len(values) < 2 and "num_classes" not in keywords:
            self.report(node, "D2H_SYNC", "one_hot without num_classes reads the maximum")
        elif last == "histc" and len(values) < 4 and "max" not in keywords:
            self.report(node, "D2H_SYNC", "histc without a range reads minimum and maximum")
        elif last in known.SYNC_FUNCTIONS:
            self.report(node, known.SYNC_FUNCTIONS[last], f"{name} makes the host wait")
        elif name.startswith("torch.linalg.") and last in known.LINALG_CHECKS:
            self.report(node, "D2H_SYNC", f"{name} checks its result on the host", Certainty.SUSPECT)
        if last in known.HOST_ANSWERS:
            return Value.HOST
        if last in known.MASK_MAKERS:
            return Value.MASK
        if last in known.FACTORIES and not last.endswith("_like") and last not in ("tril", "triu"):
            device = next((k.value for k in node.keywords if k.arg == "device"), None)
            on_host = device is None or (isinstance(device, ast.Constant) and device.value in ("cpu", "meta"))
            return Value.UNKNOWN if on_host else Value.TENSOR
        return Value.TENSOR

    def _method_call(
        self, node: ast.Call, func: ast.Attribute, name: str, values: list[Value], keywords: dict[str | None, Value]
    ) -> Value:
        owner, last = self.value(func.value), func.attr
        if last in known.HOST_METHODS and owner is not Value.UNKNOWN:
            return Value.HOST
        if last in known.SYNC_METHODS and (
            owner.is_tensor or (owner is Value.UNKNOWN and last in known.TELLING_METHODS)
        ):
            certainty = Certainty.LIKELY if owner.is_tensor else Certainty.SUSPECT
            self.report(
                node,
                known.SYNC_METHODS[last],
                f".{last}() makes the host wait" if last != "data_ptr" else ".data_ptr()",
                certainty,
            )
            return Value.HOST if last in known.HOST_ANSWERS else Value.TENSOR
        if last == "to":
            return self._moved(node, func, owner, keywords)
        if last == "repeat_interleave" and values and values[0].is_tensor and "output_size" not in keywords:
            self.report(node, "DYNAMIC_SHAPE", "repeat_interleave with tensor repeats reads their sum")
            return Value.TENSOR
        if last == "histc" and owner.is_tensor and len(values) < 3 and "max" not in keywords:
            self.report(node, "D2H_SYNC", "histc without a range reads minimum and maximum")
            return Value.TENSOR
        if last == "masked_fill" and owner.is_tensor and len(values) > 1 and values[1].is_tensor:
            self.report(node, "D2H_SYNC", "masked_fill with a device value reads it", Certainty.SUSPECT)
        if last in ("synchronize", "elapsed_time") and not owner.is_tensor:
            self.report(node, "STREAM_SYNC", f"{name} makes the host wait", Certainty.SUSPECT)
            return Value.HOST
        if last == "new_tensor" and owner.is_tensor:
            self.report(node, "H2D_PAGEABLE", "new_tensor copies host data to the device", Certainty.SUSPECT)
            return Value.TENSOR
        if owner.is_tensor:
            return Value.MASK if last in known.MASK_MAKERS else Value.TENSOR
        if name.startswith("self.") and name.count(".") == 1 and any(v.is_tensor for v in values):
            return Value.TENSOR if self.env.get(f"{name}()") is not Value.HOST else Value.HOST
        return Value.UNKNOWN

    def _moved(self, node: ast.Call, func: ast.Attribute, owner: Value, keywords: dict[str | None, Value]) -> Value:
        targets = [*node.args, *(k.value for k in node.keywords if k.arg == "device")]
        if any(isinstance(t, ast.Constant) and t.value == "cpu" for t in targets):
            self.report(node, "D2H_SYNC", '.to("cpu") copies to the host')
            return Value.UNKNOWN
        if isinstance(func.value, ast.Call) and _is_host_factory(func.value) and any(map(_names_device, targets)):
            self.report(node, "H2D_PAGEABLE", "a tensor made on the host is moved to the device", Certainty.SUSPECT)
            return Value.TENSOR
        return owner if owner.is_tensor else Value.UNKNOWN

    # ------------------------------------------------------------------ statements
    def test(self, node: ast.expr) -> None:
        """A condition: a tensor in it is read by the host."""
        if self.value(node).is_tensor:
            self.report(node, "D2H_SYNC", "a condition reads the value of a tensor")

    def bind(self, target: ast.expr, value: Value, source: ast.expr | None) -> None:
        """Assign to a target."""
        if isinstance(target, ast.Name):
            self.env[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List):
            if isinstance(source, ast.Tuple | ast.List) and len(source.elts) == len(target.elts):
                for one, item in zip(target.elts, source.elts, strict=True):
                    self.bind(one, self.value(item), item)
            else:
                for one in target.elts:
                    self.bind(one, value, None)
        elif isinstance(target, ast.Starred):
            self.bind(target.value, Value.UNKNOWN, None)
        elif isinstance(target, ast.Subscript):
            self._store(target, value, source)
        elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
            self.env[f"self.{target.attr}"] = value

    def _store(self, target: ast.Subscript, value: Value, source: ast.expr | None) -> None:
        if not self.value(target.value).is_tensor:
            return
        index = target.slice
        is_element = isinstance(index, ast.Constant) and isinstance(index.value, int)
        kind = Value.HOST if isinstance(index, ast.Slice | ast.Tuple) else self.value(index)
        is_number = isinstance(source, ast.Constant) and isinstance(source.value, int | float)
        if (is_number or value is Value.HOST) and (is_element or kind is Value.TENSOR):
            self.report(
                target,
                "H2D_PAGEABLE",
                "a Python number written to one element is copied to the device",
                Certainty.SUSPECT,
            )
        elif kind is Value.MASK and value.is_tensor:
            self.report(target, "DYNAMIC_SHAPE", "writing a tensor with a boolean mask calls nonzero")

    def statements(self, body: list[ast.stmt]) -> None:
        """Interpret statements in order."""
        for node in body:
            self.statement(node)

    def statement(self, node: ast.stmt) -> None:
        """Interpret one statement, and what stands inside it."""
        if isinstance(node, ast.Assign):
            value = self.value(node.value)
            for target in node.targets:
                self.bind(target, value, node.value)
        elif isinstance(node, ast.AnnAssign):
            if node.value is not None:
                self.bind(node.target, self.value(node.value), node.value)
        elif isinstance(node, ast.AugAssign):
            value = self.value(node.value)
            if isinstance(node.target, ast.Name) and value.is_tensor:
                self.env[node.target.id] = Value.TENSOR
        elif isinstance(node, ast.If | ast.While):
            self.test(node.test)
            self.statements(node.body)
            self.statements(node.orelse)
        elif isinstance(node, ast.Assert):
            self.test(node.test)
        elif isinstance(node, ast.For | ast.AsyncFor):
            source = self.value(node.iter)
            counts = isinstance(node.iter, ast.Call) and dotted(node.iter.func) in ("range", "enumerate")
            self.bind(node.target, Value.TENSOR if source.is_tensor else Value.HOST if counts else Value.UNKNOWN, None)
            self.statements(node.body)
            self.statements(node.orelse)
        elif isinstance(node, ast.With | ast.AsyncWith):
            for item in node.items:
                self.value(item.context_expr)
            self.statements(node.body)
        elif isinstance(node, ast.Try):
            for part in (node.body, *(h.body for h in node.handlers), node.orelse, node.finalbody):
                self.statements(part)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            scan_function(node, self.file, self.env, self.found)
        elif isinstance(node, ast.ClassDef):
            scan_class(node, self.file, self.found)
        elif isinstance(node, ast.Return | ast.Expr):
            self.value(node.value)
        elif isinstance(node, ast.Delete | ast.Raise):
            return


def _is_host_factory(node: ast.Call) -> bool:
    name = dotted(node.func).split(".")[-1]
    if name not in ("tril", "triu", "ones", "zeros", "arange", "full", "eye", "tensor", "linspace", "rand", "randn"):
        return False
    if any(k.arg == "device" for k in node.keywords):
        return False
    return not node.args or not isinstance(node.args[0], ast.Call) or _is_host_factory(node.args[0])


def _names_device(node: ast.expr) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr == "device"
    if isinstance(node, ast.Name):
        return node.id in ("device", "dev")
    return isinstance(node, ast.Constant) and str(node.value).startswith("cuda")


def scan_function(
    node: ast.FunctionDef | ast.AsyncFunctionDef, file: str, outer: dict[str, Value], found: list[Finding]
) -> None:
    """Scan one function. Raised errors' messages are not looked at: a raise ends the capture anyway."""
    function = _Function(file, node.name, outer, found)
    arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    is_annotated = all(a.annotation is not None or a.arg in ("self", "cls") for a in arguments)
    tensors = set() if is_annotated else _used_as_tensors(node)
    for argument in arguments:
        annotated = _annotated(argument.annotation)
        function.env[argument.arg] = annotated or (Value.TENSOR if argument.arg in tensors else Value.UNKNOWN)
    function.statements(node.body)


def scan_class(node: ast.ClassDef, file: str, found: list[Finding]) -> None:
    """Scan the methods of a class, and what chooses paths in it."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
            scan_function(item, file, {}, found)
        elif isinstance(item, ast.ClassDef):
            scan_class(item, file, found)


def scan_source(source: str, file: str) -> list[Finding]:
    """Findings of one file's source, by line. Raises CheckError if it is not Python."""
    try:
        tree = ast.parse(source, filename=file)
    except (SyntaxError, ValueError) as error:
        raise CheckError(f"{file} is not Python that can be parsed: {error}") from error
    found: list[Finding] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            scan_function(node, file, {}, found)
        elif isinstance(node, ast.ClassDef):
            scan_class(node, file, found)
        elif isinstance(node, ast.If):
            inner = [n for n in (*node.body, *node.orelse) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
            _Function(file, "<module>", {}, found).statements(list(inner))
    found.extend(fallback.scan_module(tree, source, file))
    unique = {(f.rule.code, f.where.line): f for f in reversed(found)}
    return sorted(unique.values(), key=lambda f: (f.where.line, f.rule.code))


def scan_file(path: Path) -> list[Finding]:
    """Findings of one file. Raises CheckError if it cannot be read or parsed."""
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckError(f"cannot read {path}: {error}") from error
    return scan_source(source, str(path.resolve()))
