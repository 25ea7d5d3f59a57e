"""The inside of the sandbox: locks itself in, then runs what standard input says. Started by `sandbox.run`, imports nothing of veneer."""

import contextlib
import ctypes
import io
import json
import math
import os
import resource
import struct
import sys
import types

ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOSYS = 1, 38
LOAD, EQUAL, ANY_BIT, AT_LEAST, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
NUMBER, ARCHITECTURE, ARGUMENT = 0, 4, 16
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
THREAD = 0x10000

# System calls that talk to the network, start or touch other processes, or change files; {call: argument} for those that open.
MACHINES = {
    "x86_64": {
        "architecture": 0xC000003E,
        "denied": [
            41, 42, 43, 44, 46, 49, 50, 53, 57, 58, 59, 62, 76, 77, 82, 83, 84, 85, 86, 87, 88, 90, 91, 92, 93, 94, 101, 133, 160, 165, 166,
            188, 189, 190, 200, 234, 258, 259, 260, 263, 264, 265, 266, 268, 272, 280, 302, 310, 311, 316, 322, 424, 425, 437,
        ],
        "opening": {2: 1, 257: 2},
        "clone": 56,
    },
    "aarch64": {
        "architecture": 0xC00000B7,
        "denied": [
            5, 6, 7, 33, 34, 35, 36, 37, 38, 39, 40, 45, 46, 52, 53, 54, 55, 88, 97, 117, 129, 130, 131, 164, 198, 199, 200, 201, 202, 203,
            206, 211, 221, 261, 270, 271, 276, 281, 424, 425, 437,
        ],
        "opening": {56: 2},
        "clone": 220,
    },
}  # fmt: skip
CLONE3 = 435


def filter_of(machine):
    """The filter as instructions (code, jump if true, jump if not, constant)."""
    known = MACHINES[machine]
    made = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, known["architecture"]), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    made += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, ERROR | EPERM)]  # the other numbering of x86
    for call in known["denied"]:
        made += [(EQUAL, 0, 1, call), (RETURN, 0, 0, ERROR | EPERM)]
    made += [(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, ERROR | ENOSYS)]  # its flags cannot be seen: the C library then takes clone
    for call, place in known["opening"].items():
        made += [(EQUAL, 0, 4, call), (LOAD, 0, 0, ARGUMENT + 8 * place), (ANY_BIT, 0, 1, WRITING), (RETURN, 0, 0, ERROR | EPERM)]
        made += [(RETURN, 0, 0, ALLOW)]
    made += [(EQUAL, 0, 4, known["clone"]), (LOAD, 0, 0, ARGUMENT), (ANY_BIT, 1, 0, THREAD), (RETURN, 0, 0, ERROR | EPERM)]
    return [*made, (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, ALLOW)]


def lock(seconds, megabytes):
    """Limits on time, memory and files, then the filter, which stays on."""
    for what, most in (
        (resource.RLIMIT_CPU, math.ceil(seconds)),
        (resource.RLIMIT_AS, megabytes * 1024 * 1024),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(what, (most, most))
    code = b"".join(struct.pack("HBBI", *one) for one in filter_of(os.uname().machine))
    held = ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    library = ctypes.CDLL(None, use_errno=True)
    wanted = Program(len(code) // 8, ctypes.addressof(held))
    if library.prctl(38, 1, 0, 0, 0) or library.prctl(22, 2, ctypes.byref(wanted), 0, 0):
        raise OSError(ctypes.get_errno(), "the system call filter was refused")


def executable(code):
    """Lines of a code object and of all inside it."""
    lines = {line for _, _, line in code.co_lines() if line}
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            lines |= executable(inner)
    return lines


def main():
    order = json.load(sys.stdin)
    said = {"status": "passed", "reason": "", "output": "", "done": [], "lines": []}
    done, printed = set(), io.StringIO()

    def tracer(frame, event, argument):
        if frame.f_code.co_filename != "<measured>":
            return None
        if event == "line":
            done.add(frame.f_lineno)
        return tracer

    space = {"__name__": "__main__"}
    lock(order["seconds"], order["megabytes"])
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            if order["measured"]:
                code = compile(order["measured"], "<measured>", "exec")
                said["lines"] = sorted(executable(code))
                sys.settrace(tracer)
                exec(code, space)
            exec(compile(order["program"], "<program>", "exec"), space)
    except MemoryError:
        said.update(status="memory", reason=f"it wanted more than {order['megabytes']} MB")
    except BaseException as error:
        last = (str(error).strip().splitlines() or [""])[-1][:300]
        said.update(status="failed", reason=f"{type(error).__name__}: {last}".rstrip(": "))
    finally:
        sys.settrace(None)
    said["done"], said["output"] = sorted(done), printed.getvalue()[-4000:]
    os.write(1, (f"\n{order['token']}{json.dumps(said)}\n").encode())
    os._exit(0)


if __name__ == "__main__":
    main()
