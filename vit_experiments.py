"""Vision Transformer on CIFAR-10 and CIFAR-100: 1.58-bit weights and pruning.

    python3 vit_experiments.py                                      # google/vit-base-patch16-224-in21k, every row
    python3 vit_experiments.py --options checkpoint=FOLDER          # any ViT checkpoint: a folder, or a name on the Hub
    python3 vit_experiments.py --options checkpoint=none            # the compact ViT for 32×32 images, from scratch
    python3 vit_experiments.py --quick                              # handwritten digits, minutes on a CPU, no download
"""

from dataclasses import replace
from typing import Any

from torch import nn

from pruning_utils import l1, l1_global, l2_filters, random
from quantization_utils import absmean_fitted, absmean_per_tensor, int8_absmax, mse_optimal, twn
from quantization_utils.post_training import Settings
from train_test_utils.experiment import main
from train_test_utils.recipe import Recipe, adamw
from train_test_utils.rows import Prune, Row, Ternary
from train_test_utils.transforms import CalibratedStart, CalibratedTernary, ReconstructedTernary

FROM_SCRATCH = Recipe(epochs=200, lr=1e-3, optimizer=adamw, weight_decay=0.05, label_smoothing=0.1, clip_norm=1.0)
PRETRAINED = Recipe(epochs=7, lr=5e-5, optimizer=adamw, weight_decay=0.01, batch_size=32, clip_norm=1.0)

LINEAR = Ternary(mse_optimal, only=nn.Linear)
QAT = Ternary(absmean_fitted, act_bits=8)
EIGHT_BIT = Ternary(int8_absmax, act_bits=8)
FIRST, LAST = "*.patch_embeddings.projection", "*.classifier"  # names of layers
CALIBRATED = CalibratedStart(act_bits=8)
QAT_LINEAR = replace(QAT, only=nn.Linear)


def rows(options: dict) -> list[Row]:
    """The table; a pretrained checkpoint is fine-tuned, the compact model is trained from scratch."""
    first = PRETRAINED if options.get("checkpoint") else FROM_SCRATCH
    finetune = replace(first, lr=first.lr / 2, epochs=first.epochs if options.get("checkpoint") else 60)
    short = replace(finetune, epochs=finetune.epochs / 2)
    again = replace(finetune, epochs=finetune.epochs / 4, lr=0.4 * finetune.lr)
    return [
        #   name                    starts from  then transformed by                            then trained with
        Row("float",                None,        [],                                            first),
        Row("float_finetuned",      "float",     [],                                            finetune),
        # After training, weights only
        Row("ptq_linear",           "float",     [LINEAR],                                      None),
        Row("ptq_all_per_tensor",   "float",     [Ternary(absmean_per_tensor)],                 None),
        Row("ptq_all_twn",          "float",     [Ternary(twn)],                                None),
        Row("ptq_all",              "float",     [Ternary(mse_optimal)],                        None),
        Row("ptq_all_8bit_acts",    "float",     [Ternary(mse_optimal, act_bits=8)],            None),
        # ... and 1,024 unlabelled training images: each line adds a step to the one above
        Row("ptq_all_error_feedback", "float",   [CalibratedTernary(Settings(search=0, correct=False))], None),
        Row("ptq_all_searched",     "float",     [CalibratedTernary(Settings(correct=False))],   None),
        Row("ptq_all_corrected",    "float",     [CalibratedTernary()],                          None),
        Row("ptq_all_corrected_8bit_acts", "float", [CalibratedTernary(act_bits=8)],             None),
        Row("ptq_all_reconstructed", "float",   [ReconstructedTernary()],                       None),
        Row("ptq_all_reconstructed_8bit_acts", "float", [ReconstructedTernary(act_bits=8)],     None),
        # ... from a float network that was trained as long as the ternary ones below: what their training has to beat
        Row("ptq_all_finetuned",    "float_finetuned", [CalibratedTernary(act_bits=8, images=4096)], None),
        Row("ptq_all_finetuned_reconstructed", "float_finetuned",
            [ReconstructedTernary(act_bits=8, images=4096)], None),
        *[Row(f"ptq_linear_{score.__name__}_{p}", "float", [LINEAR, Prune(score, p / 100, only=nn.Linear)], None)
          for score in (random, l1, l2_filters, l1_global) for p in (30, 50, 70, 90)],
        # During training, weights and activations (8 bits per token)
        Row("qat_linear",           "float",     [QAT_LINEAR],                                  finetune),
        Row("qat_all",              "float",     [QAT],                                         finetune),
        Row("qat_all_per_tensor",   "float",     [replace(QAT, quantizer=absmean_per_tensor)],  finetune),
        Row("qat_all_weight_only",  "float",     [replace(QAT, act_bits=None)],                 finetune),
        Row("qat_all_8bit_first",   "float",     [replace(EIGHT_BIT, only=FIRST), QAT],         finetune),
        Row("qat_all_8bit_last",    "float",     [replace(EIGHT_BIT, only=LAST), QAT],          finetune),
        Row("qat_all_8bit_ends",    "float",     [replace(EIGHT_BIT, only=(FIRST, LAST)), QAT], finetune),
        # ... and from the codes of ptq_all_corrected, where the rows above start from the nearest ones
        Row("qat_all_calibrated",   "float",     [CALIBRATED],                                  finetune),
        # ... and, for a quarter as long, from those of ptq_all_finetuned; the float network trained on for that long
        Row("qat_all_finetuned", "float_finetuned", [replace(CALIBRATED, images=4096)],             again),
        Row("float_finetuned_twice", "float_finetuned", [],                                     again),
        # As the earlier study: pruned, then quantization-aware
        *[Row(f"qat_linear_{score.__name__}_{p}", "float", [Prune(score, p / 100, only=nn.Linear), QAT_LINEAR], short)
          for score in (random, l1, l2_filters, l1_global) for p in (30, 50, 70, 90)],
    ]  # fmt: skip


OPTIONS = {"checkpoint": "google/vit-base-patch16-224-in21k"}  # of the model, unless --options says otherwise
QUICK = ("float", "ptq_linear", "ptq_all", "qat_all", "qat_linear_l1_50", "qat_linear_l2_filters_50")


def quick_options(given: dict[str, Any]) -> dict[str, Any]:
    """A small ViT, unless the user names a checkpoint, which has a size of its own."""
    return {} if given.get("checkpoint") else {"checkpoint": None, "width": 128, "depth": 4}


if __name__ == "__main__":
    main("vit", rows, QUICK, quick_options, quick_budget=0.04, **OPTIONS)
