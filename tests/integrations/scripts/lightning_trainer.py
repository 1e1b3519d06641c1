"""PyTorch Lightning's Trainer on one process, or on the ranks that torchrun has started."""

import os

import common
import pytorch_lightning as lightning
import torch


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = common.Model()
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        loss = self.model(**batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        self.log("val_loss", self.model(**batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


callbacks = []
if common.WATCH:
    from zerotop.integrations.lightning import ZerotopCallback

    callbacks.append(ZerotopCallback())
ranks = int(os.environ.get("WORLD_SIZE", "1"))
module = Module()
loader = torch.utils.data.DataLoader(common.Samples(), common.BATCH)
held_out = torch.utils.data.DataLoader([common.Samples()[index] for index in range(4)], 2)
lightning.Trainer(
    accelerator="cpu",
    devices=ranks,
    strategy="ddp" if ranks > 1 else "auto",
    max_steps=common.STEPS,
    accumulate_grad_batches=common.MICRO_STEPS,
    val_check_interval=4,
    callbacks=callbacks,
    default_root_dir=common.OUT,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
).fit(module, loader, held_out)
common.tell(module.losses)
