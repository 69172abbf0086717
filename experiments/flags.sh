# What the toy experiments share: their flags. The scripts here source this file; it runs nothing.

# One pass over the picture with noise of time step 151; only the layers of 16 × 16 pixels are read. On the tuning scenes no
# recipe finds words clearly better (lavender_min/toy/README.md).
MAPS="--recipe noise --timesteps 151 --resolutions 16:1 --batch_size 32"

# How every toy run is tuned. A run adds its seed, its folder and what of the alignment it changes.
TUNING="--qlora --lora_targets language --lora_r 16 --lora_alpha 32 --learning_rate 1e-3 --per_device_train_batch_size 16
        --num_train_epochs ${EPOCHS:-4} --lr_scheduler_type cosine --logging_steps 32 --save_strategy epoch"

# The ablation without networks: the host's own maps are pulled.
DIRECT="--aggregate layer-mean --aligner none"
# Only words whose maps have contrast are aligned.
TRUST="--trust threshold:0.6"
