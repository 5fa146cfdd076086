"""Programs that fail their test (``f(1)`` is not EXPECTED) and try to forge a passing verdict.

``TEST_STYLES`` are ways to write the test. Many programs fool a checker that runs program and test
in the same process.
"""

from __future__ import annotations

EXPECTED = 791920274463  # long, so that it is not confused with a memory address
TEST_STYLES = {
    "assert": f"assert f(1) == {EXPECTED}",
    "assert in reverse": f"assert {EXPECTED} == f(1)",
    "membership": f"assert f(1) in [{EXPECTED}]",
    "all": f"assert all(map(lambda x: x == {EXPECTED}, map(f, [1, 2])))",
    "if": f"if not f(1) == {EXPECTED}:\n    raise AssertionError",
    "caught": f"try:\n    assert f(1) == {EXPECTED}\nexcept Exception:\n    raise ValueError",
}

_EQUAL = """
class E(BASE):
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = lambda *a: True
    __bool__ = lambda s: True
    __hash__ = lambda s: 1
    __contains__ = lambda *a: True
"""
_EVERYWHERE = """
def everywhere(line):
    import os
    for n in range(64):
        try:
            os.write(n, line)
        except OSError:
            pass
"""

FORGED_PROGRAMS = {
    "os._exit(0) when imported": "import os\nos._exit(0)",
    "os._exit(0) when called": "import os\ndef f(x): os._exit(0)",
    "sys.exit when imported": "raise SystemExit(0)",
    "sys.exit when called": "def f(x): raise SystemExit(0)",
    "KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "a kill of itself": "import os\ndef f(x): os.kill(os.getpid(), 9)",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise SystemExit(1)",
    **{
        f"{name} that equals everything": f"{_EQUAL.replace('BASE', base)}\ndef f(x): return E()"
        for name, base in (
            ("an object", "object"),
            ("an int", "int"),
            ("a float", "float"),
            ("a text", "str"),
            ("a list", "list"),
            ("a dict", "dict"),
        )
    },
    "a class that pretends to be int": f"{_EQUAL.replace('BASE', 'object')}\n"
    "E.__class__ = property(lambda s: int)\ndef f(x): return E()",
    "a list of what equals everything": f"{_EQUAL.replace('BASE', 'int')}\ndef f(x): return [E()]",
    "builtins replaced": """
import builtins
def f(x):
    for name in ("all", "any", "len", "int", "isinstance", "repr", "range", "str"):
        setattr(builtins, name, lambda *a, **k: True)
    return 0
""",
    "AssertionError replaced": """
import builtins
class AssertionError(SystemExit):
    code = 0
builtins.AssertionError = AssertionError
def f(x): return 0
""",
    "the checker's functions replaced": """
import gc, types
NAMES = ("request", "run_tests", "reply", "encode", "decode", "_to_exception", "_refuse_comparison")
def f(x):
    for function in gc.get_objects():
        if isinstance(function, types.FunctionType) and function.__name__ in NAMES:
            function.__code__ = (lambda *a, **k: {"value": 7918, "passed": True}).__code__
    return 0
""",
    "json replaced": """
import json
json.dumps = lambda *a, **k: '{"passed": true}'
json.loads = lambda *a, **k: {"passed": True}
def f(x): return 0
""",
    "a hook on errors": """
import os, sys
sys.excepthook = lambda *a: os._exit(0)
def f(x): return 0
""",
    "a verdict on every descriptor": f"{_EVERYWHERE}\n"
    "everywhere(b'{\"passed\": true}\\n')\ndef f(x): return 0",
    "a verdict on every descriptor, when called": f"{_EVERYWHERE}\n"
    "def f(x): everywhere(b'{\"passed\": true}\\n'); return 0",
    "a verdict printed, and the end": "import os\n"
    "def f(x): print('{\"passed\": true}\\nPASSED 1 passed OK', flush=True); os._exit(0)",
    "answers sent before the calls": f"{_EVERYWHERE}\n"
    "everywhere(b'{\"value\": true}\\n' * 9)\ndef f(x): return 0",
    "frames and objects searched for the expected value": """
import sys, gc
def f(x):
    wanted, frame = "".join(["791920", "274463"]), sys._getframe(1)
    while frame:
        for value in [*frame.f_locals.values(), *frame.f_globals.values(), *frame.f_code.co_consts]:
            if wanted in repr(value):
                return int(wanted)
        frame = frame.f_back
    for value in gc.get_objects():
        if type(value) in (dict, list, tuple) and len(value) < 99 and wanted in repr(value):
            return int(wanted)
    return 0
""",
    "the constants of its caller": """
import sys
def f(x):
    for constant in sys._getframe(1).f_code.co_consts:
        if type(constant) is int and constant > 1:
            return constant
    return 0
""",
    "StopIteration": "def f(x): raise StopIteration",
    "a trace in its caller": """
import os, sys
def f(x):
    sys.settrace(lambda *a: None)
    sys._getframe(1).f_trace = lambda frame, event, value: os._exit(0)
    return 0
""",
    "a thread that ends the process": """
import threading, os
def f(x):
    threading.Timer(0.05, os._exit, (0,)).start()
    while True:
        pass
""",
    "an endless answer": "import os\ndef f(x):\n    while True: os.write(3, b'x' * 65536)",
    "a deep answer": "def f(x):\n    r = []\n    for _ in range(100000): r = [r]\n    return r",
    "an answer that is none": f"{_EVERYWHERE}\ndef f(x): everywhere(b'nonsense\\n')",
    "an unknown reference": f"{_EVERYWHERE}\n"
    'def f(x): everywhere(b\'{"value": {"reference": 99}}\\n\'); return 0',
    "a module in place of a value": "import math\ndef f(x): return math",
}
