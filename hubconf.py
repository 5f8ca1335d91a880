"""For torch.hub: `torch.hub.load("path/to/clone", "student", "dinov2_vits14", source="local")`."""

dependencies = ["torch", "torchvision", "timm", "h5py", "huggingface_hub", "numpy", "PIL", "pydantic", "safetensors"]


def student(checkpoint=None, **options):
    """A student, ready for inference; the arguments of `brixel_cli.load_student`."""
    from brixel_cli import load_student

    return load_student(checkpoint, **options)
