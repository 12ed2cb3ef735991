"""Export a trained RepMLP checkpoint: `python export.py --ckpt x.pth --format onnx,trt-rtx`."""

from repmlp_deploy.cli.shared.entry import run

if __name__ == "__main__":
    run("export")
