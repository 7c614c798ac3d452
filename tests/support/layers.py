"""The rooms and the layers inside them: what may import what. `tests/test_imports.py` enforces it."""

# What each room may import, itself first. `harvest` and `train` never meet.
ROOMS = {
    "errors": (),
    "files": ("errors",),
    "settings": ("errors",),
    "lazy": (),
    "store": ("store", "errors", "files", "settings"),
    "harvest": ("harvest", "errors", "files", "settings", "lazy", "store"),
    "train": ("train", "errors", "files", "settings", "lazy", "store"),
    "evaluate": ("evaluate", "errors", "files", "settings", "store", "train"),
    "features": ("features", "errors", "files", "settings", "lazy", "store", "train", "evaluate"),
    "commands": (
        "commands",
        "errors",
        "files",
        "settings",
        "lazy",
        "store",
        "harvest",
        "train",
        "evaluate",
        "features",
    ),
}
PLAIN = {"errors", "files", "settings", "lazy", "__version__"}  # modules of the top, imported from anywhere as they are
# Inside a room: sub-rooms and files that import only what stands before them; * is every other file of the room.
LAYERS = {
    "store": ("codec", "format", "places", "write", "read", "manage"),
    "harvest": ("hub", "config", "text", "model", "*"),
    "train": ("architectures", "sae_metadata", "sae", "step", "run", "facade"),
    "evaluate": ("*", "report"),
    "features": ("find", "browse", "export", "facade"),
    "commands": ("options", "*"),
}
