# The reports of all differences in results/README.md, once its trainings are there, and the figure
# of lengths. Run it in the project's folder:
#
#     bash results/example/reports.sh
set -eu

in_folder() {
    echo "--checkpoint-dir checkpoints/$1 --results-dir results/$1"
}

# compare NAME BASELINE DISTILLED: a report in results/NAME on two folders of checkpoints/
compare() {
    rm -rf "checkpoints/$1"  # of an earlier call
    mkdir -p "checkpoints/$1"
    cp -r "checkpoints/$2" "checkpoints/$1/baseline"
    cp -r "checkpoints/$3" "checkpoints/$1/distilled"
    python evaluate.py $(in_folder "$1")
}

# The default comparison
python evaluate.py $(in_folder default)

# A better teacher, another loss, fresh seeds
python evaluate.py $(in_folder fresh)
compare fresh_96_report fresh/baseline fresh_96/distilled
compare fresh_lskd_report fresh/baseline fresh_lskd/distilled
compare fresh_96_64 fresh/distilled fresh_96/distilled
compare fresh_lskd_kd fresh_96/distilled fresh_lskd/distilled
compare fresh_shuffled_report fresh/baseline fresh_shuffled/distilled
compare fresh_shuffled_96 fresh_shuffled/distilled fresh_96/distilled

# The table
python evaluate.py $(in_folder plain_lskd)
python evaluate.py $(in_folder kd)
compare baseline_plain plain_lskd/baseline kd/baseline
compare plain_kd_plain plain_lskd/baseline plain_kd/distilled
compare plain_kd_baseline kd/baseline plain_kd/distilled
compare kd_plain plain_lskd/baseline kd/distilled
compare plain_lskd_baseline kd/baseline plain_lskd/distilled
compare lskd_baseline kd/baseline lskd/distilled
compare lskd_plain plain_lskd/baseline lskd/distilled
compare plain_lskd_kd plain_kd/distilled plain_lskd/distilled

# The baseline's settings: those of 25 epochs
compare plain_25_report plain_25/baseline length_25/baseline
compare smoothing_25_report smoothing_25/baseline length_25/baseline

# The controls
compare smooth_plain plain_lskd/baseline smooth/baseline
compare smooth_lskd smooth/baseline plain_lskd/distilled
for control in shuffled born_again own_size; do
    compare ${control}_plain plain_lskd/baseline $control/distilled
    compare ${control}_lskd $control/distilled plain_lskd/distilled
done

# Number of epochs
compare length_10 kd/baseline/seed_0 lskd/distilled/seed_0
compare length_kd_10 kd/baseline/seed_0 kd/distilled/seed_0
python evaluate.py $(in_folder length_25)
python evaluate.py $(in_folder length_50)
compare length_kd_50 length_50/baseline length_kd/distilled
compare lskd_kd_50 length_kd/distilled length_50/distilled
compare longer length_10/baseline length_50/baseline
compare longer_three ten/baseline default/baseline
compare longer_lskd length_50/baseline length_10/distilled
compare lskd_teacher length_50/distilled plain_lskd/teacher
python results/example/length.py

# Compared with timm: in the last two, the "baseline" is timm's student, the "distilled" one this project's
python evaluate.py $(in_folder ten)
python evaluate.py $(in_folder timm)
compare timm_baselines timm/baseline ten/baseline
compare timm_distilled timm/distilled ten/distilled

# At 224 px, last, since its trainings need a GPU
python evaluate.py $(in_folder large)
