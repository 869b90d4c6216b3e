"""Every setting of the project, with its unit, its legal values or its reason.

Each constant is also a command-line flag of the scripts it concerns: BATCH_SIZE is --batch-size. A flag given
by hand wins over --quick, and --quick over this file. `python train_distillation.py --help` lists them all.
"""

# Data
DATASET_NAME = "CIFAR100"         # CIFAR100, CIFAR10, Flowers102, Digits, or ImageFolder (one's own pictures)
DATASET_DIR = None                # ImageFolder: the folder with train/<class>/* and test/<class>/*, val/ optional
DATA_DIR = "data"                 # where torchvision downloads to; decoded pictures are kept in its decoded/
IMAGE_SIZE = 224                  # px, side of the square the student sees, at least 32
TEACHER_IMAGE_SIZE = None         # px, None: the student's; larger: the same crop of the same picture, in more detail
AUGMENTATION = "auto"             # auto, none, crop, flip_crop, resized_crop; auto: flip_crop for small images (crop
                                  # for digits, which are no digits when mirrored), resized_crop for photographs
VAL_FRACTION = 0.1                # share of the training images held out to choose the best epoch, above 0, below 1
SPLIT_SEED = 0                    # chooses the held-out images; apart from SEED, so that one teacher serves all seeds
NUM_WORKERS = 2                   # processes that decode photographs; small images live on the device and need none

# Models: any classifier of timm.list_models()
TEACHER_MODEL = "efficientnet_b2"
STUDENT_MODEL = "efficientnet_b0"
PRETRAINED = True                 # start both from ImageNet weights
STUDENT_WEIGHTS = None            # a local weight file (.pth, .safetensors) instead of timm's download
TEACHER_WEIGHTS = None            # the same for the teacher
TEACHER_CHECKPOINT = None         # a best_model.pth to teach with, instead of fine-tuning TEACHER_MODEL first

# Distillation: ALPHA * soft + (1 - ALPHA) * cross-entropy(labels), where soft is T^2 * KL at temperature T for "kd"
DISTILLATION_LOSS = "kd"          # kd (Hinton 2015), dkd (Zhao 2022), dist (Huang 2022), lskd (Sun 2024): see models.py
TEMPERATURE = 4.0                 # above 0; Hinton et al. 2015 use 1 to 20
ALPHA = 0.7                       # 0 to 1, weight of the soft targets; 0 is plain cross-entropy
KL_DIRECTION = "forward"          # of kd and lskd. forward: KL(teacher || student), Hinton's; reverse: KL(student || teacher)

# Optimisation: AdamW, linear warm-up, then cosine to zero, per step
BATCH_SIZE = 16                   # images a step; fits a 6 GB GPU at 224 px with room to spare
ACCUMULATE_STEPS = 1              # batches whose gradients add up to one update: the large batch's but for BatchNorm
NUM_EPOCHS = 50                   # epochs of the student, baseline and distilled alike
LEARNING_RATE = 1e-3              # peak, above 0; for AdamW from pretrained weights
WEIGHT_DECAY = 0.05               # AdamW's, kept off biases and norms
WARMUP_EPOCHS = 1.0               # epochs of linear warm-up, 0 to NUM_EPOCHS, fractions allowed
TEACHER_EPOCHS = 20               # epochs of the teacher's own fine-tuning
TEACHER_LEARNING_RATE = 1e-3      # peak, above 0, of the teacher's own fine-tuning
CLIP_GRAD = 1.0                   # clip the gradient at this norm; 0: no clipping
LABEL_SMOOTHING = 0.0             # 0 to below 1, of the students' labels; neither of the soft targets nor in the teacher's own training
MIXUP_ALPHA = 0.0                 # Beta(alpha, alpha) of mixup, 0: off
CUTMIX_ALPHA = 0.0                # the same for cutmix; with both on, each batch takes one of them
EMA_DECAY = 0.0                   # average of the weights, 0.999 say, used for validation and best_model.pth; 0: off

# Run
SEED = 42                         # weights of the new classifier head, order of images, augmentation
DEVICE = "auto"                   # auto, cuda, mps, cpu; auto takes the first there is
DETERMINISTIC = False             # bit-identical runs on CUDA too, slower; on CPUs runs always are
CUDA_GRAPH = False                # capture the step on NVIDIA GPUs, faster at small batches; off, for it was never run on one
SAVE_MINUTES = 10.0               # minutes between saves within an epoch, above 0; each epoch ends with one anyway
AMP_DTYPE = "auto"                # auto, bf16, fp16, fp32; auto: on CUDA bf16 or else fp16, fp32 elsewhere
CHECKPOINT_DIR = "checkpoints"
RESULTS_DIR = "results"

# --quick: a complete small run in minutes without GPU, network or pretrained weights, whatever stands above
QUICK = dict(
    DATASET_NAME="Digits", DATASET_DIR=None, IMAGE_SIZE=32, TEACHER_IMAGE_SIZE=None, AUGMENTATION="auto", PRETRAINED=False,
    STUDENT_WEIGHTS=None, TEACHER_WEIGHTS=None, TEACHER_CHECKPOINT=None,
    BATCH_SIZE=64, NUM_EPOCHS=15, LEARNING_RATE=4e-3, TEACHER_EPOCHS=22, TEACHER_LEARNING_RATE=3e-3,
)
