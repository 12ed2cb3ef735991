"""Export a trained RepMLP checkpoint: `python export.py --ckpt x.pth --format onnx,trt-rtx`."""

from repmlp_deploy.cli.entry import export

if __name__ == "__main__":
    export()
