"""Options that nobody means."""

from __future__ import annotations

from collections.abc import Iterator

from hostile.case import UNWRITTEN, USAGE, Case
from hostile.checkpoints import EVIL

HUGE = "9" * 5000
NUMBERS = ("0", "-1", "nan", "inf", "1e300", HUGE, "x", "1.5", "\u0663", EVIL.strip())


def cases() -> Iterator[Case]:
    """Yield every case of this kind."""
    for option, values in EXPORT.items():
        for value in values:
            yield Case(f"export {option} {_short(value)}", f"export --ckpt {{ckpt}} --out {{earlier}} {option} {value}")
    for command, options in OTHERS.items():
        for option, values in options.items():
            for value in values:
                yield Case(f"{command.split()[0]} {option} {_short(value)}", f"{command} {option} {value}")
    for name, (command, code) in WHOLE.items():
        yield Case(name, command, None, code)


def _short(value: str) -> str:
    return value if len(value) < 40 else f"{value[:10]}… ({len(value)})"


EXPORT = {
    "--batch": (*NUMBERS, "1:2", "8:4:2", "1:8:1000000000", "1:8:64:99", ":::", "1,1000", ",".join(["1:1:1"] * 1000)),
    "--workspace-gb": ("1e300", "nan", "-1", "x", HUGE),
    "--compute-capability": (HUGE, "8", "8.6.1", "-8.6", "", EVIL.strip()),
    "--optimization-level": ("-1", "6", HUGE, "x"),
    "--opset": ("-1", "0", "10", "99", HUGE, "x"),
    "--input-size": ("0x0", "-1x32", "32", "1x1", f"{HUGE}x{HUGE}", "99999999x99999999", "64x64", EVIL.strip()),
    "--module": (
        "os:system",
        "sys:exit",
        "subprocess:run",
        "builtins:exec",
        ":",
        "x",
        "a.b:c:d",
        "..x:y",
        "torch:load",
    ),
    "--mean": ("nan,1,2", "1,2", "1," * 1000 + "1", "x", HUGE),
    "--std": ("0,0,0", "inf,1,1", "-1,1,1", "0.2,0.2,0.2"),
    "--resize": ("0", "-1", HUGE, "99999999x1"),
    "--crop": ("0x0", "64x64", HUGE),
    "--scores": ("exec", EVIL.strip(), "sigmoid"),
    "--format": ("", ",", "os", EVIL.strip(), ",".join(["x"] * 10_000), "onnx,../x"),
    "--precision": ("fp3", "int8", ""),
    "--graph": ("", "x"),
    "--weights": ("ema", "x"),
    "--state-key": ("x", EVIL.strip(), "." * 5000),
    "--ignore": ("nothing.*", "[" * 5000, "*" * 500),
    "--keep-fp32": ("x",),
    "--calibration": ("/dev/zero",),
    "--verbosity": ("x",),
}

OTHERS = {
    "predict {bundle} {image}": {
        "--threads": NUMBERS,
        "--top": ("0", "-1", "x", HUGE),
        "--device": ("x", "", EVIL.strip()),
        "--format": ("trt", "x", "", EVIL.strip()),
        "--out": ("{x}/masks",),
    },
    "verify {bundle}": {"--threads": ("0", HUGE), "--format": ("x", EVIL.strip()), "--ckpt": ("{x}/none.pth",)},
    "eval {bundle} --data {x}": {"--batch": ("0", "-1", HUGE), "--workers": ("0", "-1", HUGE)},
    "build {earlier}": {
        "--batch": ("0", HUGE),
        "--format": ("onnx", "x"),
        "--weights": ("ema",),
        "--refit-from": ("/dev/zero", "{x}/none.pth"),
        "--workspace-gb": ("1e300",),
    },
    "bench --seconds 1": {
        "--models": ("x", "../../x", EVIL.strip()),
        "--formats": ("x",),
        "--batch": ("0", HUGE, "x"),
        "--threads": ("0", HUGE),
        "--limit": ("-1", "nan", "inf", "0"),
        "--idle": ("-1", "nan", "1e300"),
        "--baseline": ("x",),
        "--threshold": ("0", "nan", "-1"),
        "--suite": ("/dev/zero", "{x}/none.toml"),
        "--compare": ("/dev/zero", "{x}/none.json", "{ckpt}"),
        "--json": ("{x}",),
        "--bundle": ("{x}",),
        "--ckpt": ("/dev/zero",),
        "--calibration": ("{x}/none",),
    },
}

WHOLE = {
    "no command": ("", USAGE),
    "a command with escapes": (EVIL.strip(), USAGE),
    "a command of a megabyte": ("x" * 100_000, USAGE),
    "an option with escapes": (f"export --{EVIL.strip()}", USAGE),
    "an option of a megabyte": ("export --" + "x" * 100_000, USAGE),
    "an option without a value": ("export --ckpt", USAGE),
    "a value for a flag": ("export --ckpt {ckpt} --sensitivity=maybe", USAGE),
    "int8 without calibration": ("export --ckpt {ckpt} --precision int8 --out {earlier}", USAGE),
    "an ONNX file as a checkpoint": ("export --ckpt {bundle}/model.onnx --out {earlier}", USAGE),
    "a bundle as a checkpoint": ("export --ckpt {bundle} --out {earlier}", USAGE),
    "a checkpoint as a bundle": ("predict {ckpt} {image}", USAGE),
    "a bundle as a picture": ("predict {bundle} {bundle}", USAGE),
    "a report into a folder that is not there": ("bench --json {x}/a/b.json", UNWRITTEN),
    "a cache in a device": ("predict {bundle} {image} --cache /dev/null", UNWRITTEN),
    "a cache in a folder of the system": ("predict {bundle} {image} --cache /proc/x", UNWRITTEN),
    "a cache in a device, of the artifact that keeps nothing": (
        "predict {bundle} {image} --format onnx --cache /dev/null",
        UNWRITTEN,
    ),
    "a report into a device": ("bench --seconds 1 --models x --json /dev/full", USAGE),
}
