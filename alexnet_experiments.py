"""AlexNet on CIFAR-10 and CIFAR-100: 1.58-bit weights and pruning.

    python3 alexnet_experiments.py                                # both data sets, every row
    python3 alexnet_experiments.py --quick                        # handwritten digits, minutes on a CPU, no download
    python3 alexnet_experiments.py --options batch_norm=false     # the earlier study's network
"""

from dataclasses import replace

from torch import nn

from pruning_utils import l1, l1_global, l2_filters, random
from quantization_utils import absmean_fitted, absmean_per_tensor, int8_absmax, mse_optimal, twn
from quantization_utils.post_training import Settings
from train_test_utils.experiment import main
from train_test_utils.recipe import Recipe, sgd
from train_test_utils.rows import Prune, Row, Ternary
from train_test_utils.transforms import CalibratedStart, CalibratedTernary, ReconstructedTernary, TernaryStart

SCRATCH = Recipe(epochs=100, lr=0.05, optimizer=sgd, weight_decay=5e-4, clip_norm=5.0, cutout=8, label_smoothing=0.1)
FINETUNE = replace(SCRATCH, epochs=30, lr=0.01, weight_decay=1e-4)
SHORT = replace(FINETUNE, epochs=15)
AGAIN = replace(FINETUNE, epochs=7.5, lr=0.004)

LINEAR = Ternary(mse_optimal, only=nn.Linear)
QAT = TernaryStart(absmean_fitted, act_bits=8)
EIGHT_BIT = Ternary(int8_absmax, act_bits=8)
CALIBRATED = CalibratedStart(act_bits=8)


def rows(options: dict) -> list[Row]:
    """The table; the original without batch norm has its layers under other numbers."""
    first, last = "1", "28" if options.get("batch_norm", True) else "21"  # names of layers
    return [
        #   name                    starts from  then transformed by                            then trained with
        Row("float",                None,        [],                                            SCRATCH),
        Row("float_finetuned",      "float",     [],                                            FINETUNE),
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
        Row("ptq_all_finetuned",    "float_finetuned", [CalibratedTernary(act_bits=8, images=16384)], None),
        Row("ptq_all_finetuned_reconstructed", "float_finetuned",
            [ReconstructedTernary(act_bits=8, images=4096)], None),
        # As the earlier study: convolutions pruned after the linear layers became ternary
        *[Row(f"ptq_linear_{score.__name__}_{p}", "float", [LINEAR, Prune(score, p / 100, only=nn.Conv2d)], None)
          for score in (random, l1, l2_filters, l1_global) for p in (30, 50, 70, 90)],
        # During training, weights and activations: integer arithmetic from the first layer to the last
        Row("qat_linear",           "float",     [replace(QAT, only=nn.Linear)],                 SHORT),
        Row("qat_all",              "float",     [QAT],                                         FINETUNE),
        Row("qat_all_6bit_acts",    "float",     [replace(QAT, act_bits=6)],                    FINETUNE),
        Row("qat_all_4bit_acts",    "float",     [replace(QAT, act_bits=4)],                    FINETUNE),
        Row("qat_all_weight_only",  "float",     [replace(QAT, act_bits=None)],                 FINETUNE),
        Row("qat_all_8bit_first",   "float",     [replace(EIGHT_BIT, only=first), QAT],         FINETUNE),
        Row("qat_all_8bit_last",    "float",     [replace(EIGHT_BIT, only=last), QAT],          FINETUNE),
        Row("qat_all_8bit_ends",    "float",     [replace(EIGHT_BIT, only=(first, last)), QAT], FINETUNE),
        # ... and from the codes of ptq_all_corrected, where the rows above start from the nearest ones
        Row("qat_all_calibrated",   "float",     [CALIBRATED],                                  FINETUNE),
        Row("qat_all_calibrated_6bit_acts", "float", [replace(CALIBRATED, act_bits=6)],     FINETUNE),
        Row("qat_all_calibrated_weight_only", "float", [replace(CALIBRATED, act_bits=None)], FINETUNE),
        # ... and, for a quarter as long, from those of ptq_all_finetuned; the float network trained on for that long
        Row("qat_all_finetuned", "float_finetuned", [replace(CALIBRATED, images=16384)],            AGAIN),
        Row("float_finetuned_twice", "float_finetuned", [],                                     AGAIN),
        *[Row(f"qat_all_{score.__name__}_{p}", "float", [Prune(score, p / 100), QAT],           SHORT)
          for score in (random, l1, l2_filters, l1_global) for p in (30, 50, 70, 90)],
    ]  # fmt: skip


QUICK = ("float", "ptq_linear", "ptq_all", "qat_all", "qat_all_l1_50", "qat_all_l2_filters_50")

if __name__ == "__main__":
    main("alexnet", rows, QUICK)
