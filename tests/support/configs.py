"""A configuration object such as training code saves beside its weights."""


class Config(dict):
    """Stands for a configuration object that pickles by its class, as yacs's CfgNode does."""
