"""Export a trained RepMLP checkpoint: `python export.py --ckpt x.pth --format onnx,trt-rtx`."""

from repmlp_deploy.cli.export import main

if __name__ == "__main__":
    main()
