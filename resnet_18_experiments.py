"""ResNet-18 on CIFAR-10 and CIFAR-100: 1.58-bit weights and pruning.

    python3 resnet_18_experiments.py                            # both data sets, every row
    python3 resnet_18_experiments.py --quick                    # handwritten digits, minutes on a CPU, no download
    python3 resnet_18_experiments.py --options stem=maxpool     # the earlier study's stem, a quarter of the work
    torchrun --nproc_per_node=4 resnet_18_experiments.py --only "qat*"
"""

from dataclasses import replace

from torch import nn

from pruning_utils import l1, l1_global, l2_filters, random
from quantization_utils import absmean, absmean_fitted, absmean_per_tensor, int8_absmax, mse_optimal, twn
from quantization_utils.post_training import Settings
from train_test_utils.experiment import main
from train_test_utils.recipe import Recipe, sgd
from train_test_utils.rows import Prune, Reinitialize, Row, Ternary
from train_test_utils.transforms import CalibratedStart, CalibratedTernary, ReconstructedTernary, TernaryStart

SCRATCH = Recipe(epochs=200, lr=0.1, optimizer=sgd, weight_decay=5e-4, cutout=16, label_smoothing=0.1)
FINETUNE = replace(SCRATCH, epochs=60, lr=0.05, weight_decay=1e-4, statistics_images=8192)
SHORT = replace(FINETUNE, epochs=30)
AGAIN = replace(FINETUNE, epochs=15, lr=0.02)

LINEAR = Ternary(mse_optimal, only=nn.Linear)
QAT = TernaryStart(absmean_fitted, act_bits=8)
EIGHT_BIT = Ternary(int8_absmax, act_bits=8)
FIRST, LAST = "conv1", "fc"  # names of layers
CALIBRATED = CalibratedStart(act_bits=8)

ROWS = [
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
    Row("ptq_all_finetuned",    "float_finetuned", [CalibratedTernary(act_bits=8, images=4096)], None),
    Row("ptq_all_finetuned_reconstructed", "float_finetuned", [ReconstructedTernary(act_bits=8, images=4096)], None),
    # As the earlier study: convolutions pruned after the linear layer became ternary
    *[Row(f"ptq_linear_{score.__name__}_{p}", "float", [LINEAR, Prune(score, p / 100, only=nn.Conv2d)], None)
      for score in (random, l1, l2_filters, l1_global) for p in (30, 50, 70, 90)],
    # During training, weights and activations: integer arithmetic from the first layer to the last
    Row("qat_linear",           "float",     [Ternary(absmean_fitted, act_bits=8, only=nn.Linear)], SHORT),
    Row("qat_all",              "float",     [QAT],                                         FINETUNE),
    Row("qat_all_per_tensor",   "float",     [replace(QAT, quantizer=absmean_per_tensor)],  FINETUNE),
    Row("qat_all_6bit_acts",    "float",     [replace(QAT, act_bits=6)],                    FINETUNE),
    Row("qat_all_4bit_acts",    "float",     [replace(QAT, act_bits=4)],                    FINETUNE),
    Row("qat_all_weight_only",  "float",     [replace(QAT, act_bits=None)],                 FINETUNE),
    Row("qat_all_8bit_first",   "float",     [replace(EIGHT_BIT, only=FIRST), QAT],         FINETUNE),
    Row("qat_all_8bit_last",    "float",     [replace(EIGHT_BIT, only=LAST), QAT],          FINETUNE),
    Row("qat_all_8bit_ends",    "float",     [replace(EIGHT_BIT, only=(FIRST, LAST)), QAT], FINETUNE),
    # ... and from the codes of ptq_all_corrected, where the rows above start from the nearest ones
    Row("qat_all_calibrated",   "float",     [CALIBRATED],                                  FINETUNE),
    Row("qat_all_calibrated_6bit_acts", "float", [replace(CALIBRATED, act_bits=6)],     FINETUNE),
    Row("qat_all_calibrated_weight_only", "float", [replace(CALIBRATED, act_bits=None)], FINETUNE),
    # ... and, for a quarter as long, from those of ptq_all_finetuned; the float network trained on for that long
    Row("qat_all_finetuned", "float_finetuned", [replace(CALIBRATED, images=4096)],             AGAIN),
    Row("float_finetuned_twice", "float_finetuned", [],                                     AGAIN),
    # What each ingredient of qat_all does: it is left out or put in
    Row("qat_all_from_scratch", "float",     [Reinitialize(), QAT],                         SCRATCH),
    Row("qat_all_absmean",      "float",     [replace(QAT, quantizer=absmean)],             FINETUNE),
    Row("qat_all_ramped",       "float",     [QAT],                           replace(FINETUNE, ramp=0.3)),
    Row("qat_all_running_statistics", "float", [QAT],               replace(FINETUNE, statistics_images=0)),
    *[Row(f"qat_all_distilled_{share}_{t}", "float", [QAT], replace(FINETUNE, distill=share / 100, temperature=t))
      for share, t in ((50, 1), (50, 4), (90, 4))],  # percent of the loss, temperature
    Row("qat_all_calibrated_distilled", "float", [CALIBRATED],  replace(FINETUNE, distill=0.5, temperature=4)),
    Row("float_l2_filters_50",  "float",     [Prune(l2_filters, 0.5, only=nn.Conv2d)],      SHORT),
    *[Row(f"qat_all_{score.__name__}_{p}", "float", [Prune(score, p / 100, only=nn.Conv2d), QAT], SHORT)
      for score in (random, l1, l2_filters, l1_global) for p in (30, 50, 70, 90)],
]  # fmt: skip

quick_options = {"stem": "maxpool"}
QUICK = ("float", "ptq_all", "qat_all", "qat_all_l1_50", "qat_all_l2_filters_50")

if __name__ == "__main__":
    main("resnet_18", ROWS, QUICK, quick_options)
