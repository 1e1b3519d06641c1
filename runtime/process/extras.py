"""How to install what an installation of zerotop lacks: the extras of pyproject.toml."""


def install_extra(*extras: str) -> str:
    """What to run for these extras."""
    return f"pip install '.[{','.join(extras)}]' in zerotop's source folder"


INSTALL_TRAINING = install_extra("train")
INSTALL_FINETUNING = install_extra("train", "finetune")
