"""The `gsae` commands: one file a group of them, and the table from which `cli.py` imports one when it is called.

To add a command, write a function in a file of this folder and its line here: the command's name, file and function,
and its summary, which is also the first line of the function's docstring. `gsae --help` imports only this table.
"""

HELP_WIDTH = 100  # columns of --help

COMMANDS = {
    "demo": ("demo:demo", "Run the whole pipeline on a language model and a text that come as packages."),
    "harvest": ("harvest:harvest", "Run a language model over a text and store its activations at some sites."),
    "sites": ("harvest:sites", "List the sites that a language model offers, from its config, without weights."),
    "info": ("store:info", "Show what a store or a training run holds."),
    "ls": ("store:list_stores", "List the stores at or under a folder or URL: model, sites, rows, size and state."),
    "verify": ("store:verify", "Check that a store holds what its manifest says. Exit code 4: it does not."),
    "seal": ("store:seal", "Publish the finished windows of an unfinished harvest as a complete store, for good."),
    "copy": ("store:copy", "Copy a store between folders and object stores, and check every file on the way."),
    "train": ("train:train", "Fit SAEs to the rows of a site, all from one stream of batches."),
    "eval": ("evaluate:evaluate", "Measure every SAE of a run on held-out rows, and the loss that the model recovers."),
    "report": ("evaluate:report", "Write one HTML file with the plots and tables of some runs. It needs no network."),
    "features": (
        "features:features",
        "Describe every latent of a run's SAEs: its firings, tokens and effect on logits.",
    ),
    "browse": ("features:browse", "Show in a browser what `gsae features` found, or compare two SAEs blind."),
    "export": (
        "features:export",
        "Write a trained SAE, or what its latents fire on, for the loader of another project.",
    ),
}
