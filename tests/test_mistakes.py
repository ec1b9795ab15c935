"""Every mistake a user makes: one line, exit code 2, no traceback, nothing saved is touched.

The cases run in one process without pytest's type-checking hooks, through the same entry point
as `scripts/train.py`; those that begin with `hf.load` give a folder to the reader of Hugging
Face checkpoints.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

from switchx import configuration
from switchx.experiment import Experiment

ROOT = pathlib.Path(__file__).parents[1]
TINY = "--gin_file=gin_configs/switch_tiny.gin"

DRIVER = """
import contextlib, io, json, sys
from switchx import configuration
from switchx.experiment import Experiment
from switchx.interop import hf
from switchx.run import train

results = []
for arguments in json.load(sys.stdin):
    sys.argv = ["train.py", *arguments]
    error, code = io.StringIO(), 0
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            if arguments[:1] == ["hf.load"]:
                sys.argv[1:] = ["--gin_file=gin_configs/switch_tiny.gin"]
                configuration.main(Experiment, lambda *_: hf.load(arguments[1]), "")
            else:
                configuration.main(Experiment, train, "")
        except SystemExit as exit:
            code = exit.code
        except BaseException as escaped:
            code = repr(escaped)
    results.append([code, error.getvalue()])
print(json.dumps(results))
"""

# Arguments, and what the message must contain.
FILES = {
    "empty.txt": "",
    "broken.jsonl": '{"inputs": "a", "targets": "b"}\n{"inputs": \n',
    "empty.csv": "",
    "broken.csv": 'inputs,targets\na,b\n"c,d\n',
    "pairs.csv": "question,answer\n" + "a,b\n" * 20,
    "labels.jsonl": '{"inputs": "a", "targets": "yes"}\n' * 20
    + '{"inputs": "b", "targets": "noo"}\n',
    "long.jsonl": '{"inputs": "a", "targets": "'
    + "so it goes on " * 20
    + '"}\n' * 1
    + '{"inputs": "b", "targets": "'
    + "and never ends " * 20
    + '"}\n',
    "templates.json": '{"tasks": {"date_iso": {"templates": [{"name": "x", "inputs": "{dte}"}]}}}',
    "columns.jsonl": '{"question": "a", "targets": "b"}\n' * 50,
    "twice.gin": "include 'gin_configs/switch_tiny.gin'\nTRAIN_STEPS = 5\nTRAIN_STEPS = 6\n",
    "syntax.gin": "include 'gin_configs/switch_tiny.gin'\nTRAIN_STEPS = = 5\n",
    "include.gin": "include 'gin_configs/switch_tyny.gin'\n",
    "nested_twice.gin": "include '{tmp}/twice.gin'\n",
    "circle.gin": "include '{tmp}/circle.gin'\n",
    "unused.gin": textwrap.dedent(
        """
        from __gin__ import dynamic_registration
        from switchx.data import tasks
        include 'gin_configs/switch_tiny.gin'
        tasks.FileTask.name = 'mine'
        """
    ),
    "required.gin": "include 'gin_configs/switch_tiny.gin'\n"
    "include 'gin_configs/data/text_file.gin'\n",
    "field.gin": textwrap.dedent(
        """
        from __gin__ import dynamic_registration
        from switchx.models import config
        include 'gin_configs/switch_tiny.gin'
        config.ModelConfig.d_modle = 32
        """
    ),
    "class.gin": textwrap.dedent(
        """
        from __gin__ import dynamic_registration
        from switchx.models import config
        include 'gin_configs/switch_tiny.gin'
        config.ModelConfg.d_model = 32
        """
    ),
    "text.gin": "include 'gin_configs/switch_tiny.gin'\ninclude 'gin_configs/data/text_file.gin'\n",
    "pairs.gin": "include 'gin_configs/switch_tiny.gin'\n"
    "include 'gin_configs/data/jsonl_file.gin'\n",
    "zero.gin": textwrap.dedent(
        """
        from __gin__ import dynamic_registration
        from switchx.data import mixtures
        from switchx.data import pipeline
        include 'gin_configs/switch_tiny.gin'
        MIXTURE_OR_TASK_NAME = 'mine'
        pipeline.DataConfig.tasks = [@mixtures.Mixture()]
        mixtures.Mixture.name = 'mine'
        mixtures.Mixture.tasks = ['date_iso', 'wn_syn_ant']
        mixtures.Mixture.rates = {'date_iso': 0, 'wn_syn_ant': 0.0}
        """
    ),
    "supervised.gin": textwrap.dedent(
        """
        from __gin__ import dynamic_registration
        from switchx.data import tasks
        include 'gin_configs/switch_tiny.gin'
        include 'gin_configs/data/text_file.gin'
        tasks.FileTask.objective = 'supervised'
        """
    ),
}
FILES |= {
    "bracket.gin": "include 'gin_configs/switch_tiny.gin'\nMESH = {'data': 1\n",
    "bare_word.gin": "include 'gin_configs/switch_tiny.gin'\nTRAIN_STEPS = five\n",
    "no_equals.gin": "include 'gin_configs/switch_tiny.gin'\nTRAIN_STEPS 5\n",
    "import.gin": "include 'gin_configs/switch_tiny.gin'\nimport switchx.modles\n",
    "reference.gin": "include 'gin_configs/switch_tiny.gin'\nTRAIN_STEPS = @steps()\n",
    "itself.gin": "include 'gin_configs/switch_tiny.gin'\nTRAIN_STEPS = %TRAIN_STEPS\n",
    "short.txt": "one line only\n",
    "binary.txt": "\x00\x01\x02" * 99,
    "not_gzip.txt.gz": "plain text",
    "table.tsv": "question\tanswer\na\tb\n",
    "no_text.jsonl": '{"inputs": "a"}\n' * 50,
    "fake.model": "no sentencepiece model",
    "mixture.gin": textwrap.dedent(
        """
        from __gin__ import dynamic_registration
        from switchx.data import mixtures
        from switchx.data import pipeline
        include 'gin_configs/switch_tiny.gin'
        MIXTURE_OR_TASK_NAME = 'mine'
        pipeline.DataConfig.tasks = [@mixtures.Mixture()]
        mixtures.Mixture.name = 'mine'
        mixtures.Mixture.tasks = ['wn_defin']
        """
    ),
    "twins.gin": textwrap.dedent(
        """
        from __gin__ import dynamic_registration
        from switchx.data import pipeline
        from switchx.data import tasks
        include 'gin_configs/switch_tiny.gin'
        include 'gin_configs/data/text_file.gin'
        pipeline.DataConfig.tasks = [@tasks.FileTask(), @tasks.FileTask()]
        """
    ),
    "tfds.gin": textwrap.dedent(
        """
        from __gin__ import dynamic_registration
        from switchx.data import pipeline
        from switchx.data import tasks
        include 'gin_configs/switch_tiny.gin'
        MIXTURE_OR_TASK_NAME = 'rte'
        pipeline.DataConfig.tasks = [@tasks.TfdsTask()]
        pipeline.DataConfig.tfds_data_dir = '{tmp}'
        tasks.TfdsTask.name = 'rte'
        tasks.TfdsTask.tfds_name = 'glue/rte:2.0.0'
        tasks.TfdsTask.objective = 'supervised'
        tasks.TfdsTask.inputs_fields = ['sentence1', 'sentence2']
        tasks.TfdsTask.targets_field = 'label'
        """
    ),
}
CASES = {
    "no configuration": ([], ["--gin_file"]),
    "missing file": (
        ["--gin_file=gin_configs/switch_tin.gin"],
        ["switch_tin.gin", "switch_tiny.gin"],
    ),
    "unknown flag": ([TINY, "--gin_fil=x"], ["--gin_fil"]),
    "binding without value": ([TINY, "--gin.TRAIN_STEPS"], ["--gin.TRAIN_STEPS=VALUE"]),
    "binding without name": ([TINY, "--gin.=3"], ["--gin.=3", "--gin.NAME=VALUE"]),
    "misspelt macro": ([TINY, "--gin.TRAIN_STEP=5"], ["TRAIN_STEP ", "TRAIN_STEPS"]),
    "macro of another configuration": (
        ["--gin_file=gin_configs/t5_tiny.gin", "--gin.NUM_EXPERTS=4"],
        ["NUM_EXPERTS"],
    ),
    "macro bound twice": (["--gin_file={tmp}/twice.gin"], ["twice.gin:3", "TRAIN_STEPS", "line 2"]),
    "gin syntax": (["--gin_file={tmp}/syntax.gin"], ["syntax.gin"]),
    "missing include": (
        ["--gin_file={tmp}/include.gin"],
        ["include.gin:1", "'gin_configs/switch_tyny.gin'", "no such file", "switch_tiny.gin'"],
    ),
    "macro bound twice in an include": (
        ["--gin_file={tmp}/nested_twice.gin"],
        ["twice.gin:3", "TRAIN_STEPS", "line 2"],
    ),
    "configuration that is no text": (["--gin_file=/bin/ls"], ["/bin/ls", "not a text file"]),
    "bool in the mesh": ([TINY, "--gin.MESH={'data': True}"], ["MESH", "positive integers"]),
    "include of itself": (["--gin_file={tmp}/circle.gin"], ["circle.gin:1", "itself"]),
    "no sparse layer": ([TINY, "--gin.ModelConfig.sparse_every=5"], ["sparse_every", "t5"]),
    "binding nothing uses": (["--gin_file={tmp}/unused.gin"], ["FileTask", "never used"]),
    "macro without value": (["--gin_file={tmp}/required.gin"], ["TEXT_FILES"]),
    "misspelt field": (["--gin_file={tmp}/field.gin"], ["d_modle", "d_model"]),
    "misspelt field on the command line": (
        [TINY, "--gin.ModelConfig.d_modle=3"],
        ["d_modle", "d_model"],
    ),
    "misspelt class": (
        ["--gin_file={tmp}/class.gin"],
        ["class.gin:5", "ModelConfg", "ModelConfig"],
    ),
    "misspelt class on the command line": (
        [TINY, "--gin.ModelConfg.d_model=3"],
        ["ModelConfg", "ModelConfig"],
    ),
    "string for a number": ([TINY, "--gin.TRAIN_STEPS=many"], ["train_steps", "'many'", "int"]),
    "float for an int": ([TINY, "--gin.BATCH_SIZE=2.5"], ["batch_size", "2.5"]),
    "bool for a number": ([TINY, "--gin.CAPACITY_FACTOR=True"], ["capacity_factor", "True"]),
    "unfinished literal": ([TINY, "--gin.MESH={'data': 1"], ["MESH"]),
    "zero steps": ([TINY, "--gin.TRAIN_STEPS=0"], ["train_steps", "at least 1"]),
    "zero eval period": ([TINY, "--gin.EVAL_PERIOD=0"], ["eval_period"]),
    "negative batch": ([TINY, "--gin.BATCH_SIZE=-1"], ["batch_size", "-1"]),
    "dropout of 1": ([TINY, "--gin.DROPOUT_RATE=1.0"], ["dropout_rate", "[0, 1)"]),
    "negative capacity": ([TINY, "--gin.CAPACITY_FACTOR=-1"], ["capacity_factor", "positive"]),
    "no experts": ([TINY, "--gin.NUM_EXPERTS=0"], ["num_experts", "at least 1"]),
    "unknown router": ([TINY, "--gin.MoeConfig.router=swich"], ["router", "switch"]),
    "experts that choose in a decoder": (
        [TINY, "--gin.MoeConfig.router=expert_choice"],
        ["router = 'expert_choice' looks at later tokens", "decoder_moe", "switch, top_k"],
    ),
    "batch priority in a decoder": (
        [TINY, "--gin.MoeConfig.priority=probability"],
        ["priority = 'probability' looks at later tokens", "decoder_moe", "priority 'token'"],
    ),
    "second choices after all first ones in a decoder": (
        [TINY, "--gin.MoeConfig.router=gshard", "--gin.MoeConfig.priority=choice"],
        ["priority = 'choice' looks at later tokens", "decoder_moe", "priority 'token'"],
    ),
    "more choices than experts": (
        [TINY, "--gin.MoeConfig.router=top_k", "--gin.MoeConfig.top_k=9"],
        ["top_k = 9", "num_experts = 8"],
    ),
    "a field of another router": (
        [TINY, "--gin.MoeConfig.top_k=2"],
        ["top_k = 2", "router 'switch' does not use it", "loss_free"],
    ),
    "slots of a mixture unknown": (
        [TINY, "--gin.MoeConfig.router=soft_moe"],
        ["expert_capacity = None", "soft_moe"],
    ),
    "more tasks than rows of the task router": (
        [
            TINY,
            "--gin_file=gin_configs/routers/task.gin",
            "--gin.MIXTURE_OR_TASK_NAME=embedded_pretrain_and_tasks",
        ],
        ["num_tasks = 1", "embedded_pretrain_and_tasks", "set "],
    ),
    "sentences cut by groups": (
        [
            TINY,
            "--gin_file=gin_configs/routers/sentence.gin",
            "--gin.MoeConfig.group_size=64",
            "--gin.decoder/MoeConfig.group_size=row",
        ],
        ["group_size = 64", "sentence", "at least 128"],
    ),
    "slots for what has none": (
        [TINY, "--gin.MoeConfig.dispatch=grouped"],
        ["dispatch = 'grouped'", "capacity_factor"],
    ),
    "unknown dispatch": ([TINY, "--gin.MoeConfig.dispatch=gathr"], ["dispatch", "gather"]),
    "unknown activation": (
        [TINY, "--gin.ModelConfig.activations=('rellu',)"],
        ["activations", "relu"],
    ),
    "unknown dtype": ([TINY, "--gin.ModelConfig.dtype=bfloat"], ["dtype", "bfloat16"]),
    "unknown layout": ([TINY, "--gin.ModelConfig.sparse_layout=mix"], ["sparse_layout", "mixed"]),
    "unknown remat policy": ([TINY, "--gin.ModelConfig.remat=all"], ["remat", "full"]),
    "sparse layer beyond the stack": (
        [TINY, "--gin.ModelConfig.encoder_sparse_layers=(1, 9)"],
        ["encoder_sparse_layers", "below 4"],
    ),
    "unknown optimizer": ([TINY, "--gin.OptimizerConfig.name=adafacto"], ["adafactor"]),
    "unknown schedule": ([TINY, "--gin.OptimizerConfig.schedule=rsqr"], ["schedule", "rsqrt"]),
    "unknown NaN policy": ([TINY, "--gin.Experiment.on_nonfinite=ignore"], ["on_nonfinite"]),
    "label smoothing of 1": ([TINY, "--gin.LossConfig.label_smoothing=1"], ["label_smoothing"]),
    "unknown length key": (
        [TINY, "--gin.TASK_FEATURE_LENGTHS={'input': 64, 'targets': 9}"],
        ["'input'", "inputs"],
    ),
    "unknown vocabulary": ([TINY, "--gin.DataConfig.vocabulary=spm8"], ["spm8", "spm8k"]),
    "vocabulary larger than the model": (
        [TINY, "--gin.DataConfig.vocabulary=spm32k"],
        ["vocab_size", "8192", "32100"],
    ),
    "batch not divisible by microbatches": (
        [TINY, "--gin.NUM_MICROBATCHES=5"],
        ["BATCH_SIZE = 16", "NUM_MICROBATCHES = 5", "15 and 20"],
    ),
    "groups larger than a microbatch": (
        [TINY, "--gin.NUM_MICROBATCHES=2", "--gin.MoeConfig.group_size=4096"],
        ["group_size = 4096", "2 microbatch(es)", "what fits: row, 128"],
    ),
    "unknown mesh axis": ([TINY, "--gin.MESH={'dat': 1}"], ["MESH", "'dat'", "data"]),
    "mesh of too many devices": ([TINY, "--gin.MESH={'data': 3}"], ["MESH", "3", "1 cpu"]),
    "two rests in a mesh": ([TINY, "--gin.MESH={'data': -1, 'expert': -1}"], ["MESH", "-1"]),
    "unknown task": (
        [TINY, "--gin.MIXTURE_OR_TASK_NAME=embedded_span_coruption"],
        ["embedded_span_corruption"],
    ),
    "missing data file": (
        ["--gin_file={tmp}/text.gin", "--gin.TEXT_FILES={tmp}/nothing.txt"],
        ["nothing.txt"],
    ),
    "empty data file": (
        ["--gin_file={tmp}/text.gin", "--gin.TEXT_FILES={tmp}/empty.txt"],
        ["empty.txt"],
    ),
    "broken JSON line": (
        ["--gin_file={tmp}/supervised.gin", "--gin.TEXT_FILES={tmp}/broken.jsonl"],
        ["broken.jsonl", "2"],
    ),
    "missing column": (
        ["--gin_file={tmp}/supervised.gin", "--gin.TEXT_FILES={tmp}/columns.jsonl"],
        ["columns.jsonl", "inputs", "question"],
    ),
    "empty table": (
        ["--gin_file={tmp}/pairs.gin", "--gin.TASK_FILES={tmp}/empty.csv"],
        ["empty.csv", "holds no example"],
    ),
    "broken table": (
        ["--gin_file={tmp}/pairs.gin", "--gin.TASK_FILES={tmp}/broken.csv"],
        ["broken.csv:3", "not valid CSV"],
    ),
    "missing column of a table": (
        ["--gin_file={tmp}/pairs.gin", "--gin.TASK_FILES={tmp}/pairs.csv"],
        ["pairs.csv:2", "no column 'inputs'", "found 'question', 'answer'"],
    ),
    "label outside the options": (
        [
            "--gin_file={tmp}/pairs.gin",
            "--gin.TASK_FILES={tmp}/labels.jsonl",
            "--gin.FileTask.options=['yes', 'no']",
        ],
        ["labels.jsonl:21", "targets 'noo' is none of the options", "'no'"],
    ),
    "targets longer than their length": (
        ["--gin_file={tmp}/pairs.gin", "--gin.TASK_FILES={tmp}/long.jsonl"],
        ["1 of 1 targets (train)", "TASK_FEATURE_LENGTHS['targets'] = 29", "set 'targets': "],
    ),
    "labels longer than the targets": (
        [
            TINY,
            "--gin.MIXTURE_OR_TASK_NAME=sotu_period",
            "--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 8}",
        ],
        ["sotu_period", "label '1", "11 tokens", "'targets': 11 or more"],
    ),
    "rates that sum to zero": (["--gin_file={tmp}/zero.gin"], ["rates of 'mine' sum to zero"]),
    "field that a template's task lacks": (
        [
            TINY,
            "--gin.MIXTURE_OR_TASK_NAME=embedded_instructions",
            "--gin.DataConfig.templates={tmp}/templates.json",
        ],
        ["templates.json", "'x' of task 'date_iso' has no field 'dte'", "'date'"],
    ),
    "directory of another configuration": (
        [TINY, "--gin.MODEL_DIR={tmp}/other", "--gin.CAPACITY_FACTOR=2.0"],
        ["MODEL_DIR", "model.moe.capacity_factor", "1.25", "2.0"],
    ),
    "directory that is a file": (
        [TINY, "--gin.MODEL_DIR={tmp}/empty.txt"],
        ["MODEL_DIR", "empty.txt"],
    ),
    "initial checkpoint that is none": (
        [TINY, "--gin.INITIAL_CHECKPOINT_PATH={tmp}"],
        ["INITIAL_CHECKPOINT_PATH", "no checkpoint"],
    ),
    "initial optimizer without checkpoint": (
        [TINY, "--gin.Experiment.initial_optimizer=True"],
        ["initial_optimizer", "INITIAL_CHECKPOINT_PATH"],
    ),
}


TEXT = "--gin_file={tmp}/text.gin"
HF_CONFIG = {
    "model_type": "t5",
    "vocab_size": 16,
    "d_model": 4,
    "d_ff": 4,
    "num_heads": 2,
    "d_kv": 2,
    "num_layers": 1,
}
CASES |= {
    # Configurations
    "folder for a configuration": (["--gin_file=gin_configs"], ["gin_configs: a folder"]),
    "bracket left open": (["--gin_file={tmp}/bracket.gin"], ["bracket.gin:3", "close"]),
    "string without quotes": (
        ["--gin_file={tmp}/bare_word.gin"],
        ["bare_word.gin:2", "five", "quotes"],
    ),
    "no equals sign": (["--gin_file={tmp}/no_equals.gin"], ["no_equals.gin:2", "NAME = VALUE"]),
    "import of nothing": (["--gin_file={tmp}/import.gin"], ["switchx.modles", "import.gin:2"]),
    "reference to nothing": (["--gin_file={tmp}/reference.gin"], ["@steps()", "reference.gin:2"]),
    "macro of itself": (["--gin_file={tmp}/itself.gin"], ["macro refers to itself"]),
    "learning rate that is not a number": (
        [TINY, "--gin.LEARNING_RATE=nan"],
        ["LEARNING_RATE=nan", "finite"],
    ),
    "infinite dropout": ([TINY, "--gin.DROPOUT_RATE=-inf"], ["DROPOUT_RATE=-inf", "finite"]),
    "empty value": ([TINY, "--gin.TRAIN_STEPS="], ["train_steps", "''"]),
    "negative learning rate": ([TINY, "--gin.LEARNING_RATE=-1"], ["learning_rate = -1"]),
    "negative clipping": ([TINY, "--gin.OptimizerConfig.clip_norm=-1"], ["clip_norm = -1"]),
    "negative warm-up": ([TINY, "--gin.OptimizerConfig.warmup_steps=-5"], ["warmup_steps = -5"]),
    "weight decay of Adafactor": (
        [TINY, "--gin.OptimizerConfig.weight_decay=0.1"],
        ["weight_decay", "adamw"],
    ),
    "cosine without an end": (
        [TINY, "--gin.OptimizerConfig.schedule=cosine"],
        ["decay_steps", "cosine"],
    ),
    "no slots": ([TINY, "--gin.MoeConfig.expert_capacity=0"], ["expert_capacity = 0"]),
    "misspelt group size": ([TINY, "--gin.MoeConfig.group_size=rows"], ["'rows'", "'row'"]),
    "group size that divides nothing": (
        [TINY, "--gin.MoeConfig.group_size=7"],
        ["group_size = 7", "what fits: row, 128"],
    ),
    "no activation": ([TINY, "--gin.ModelConfig.activations=()"], ["activations"]),
    "odd position buckets": (
        [TINY, "--gin.ModelConfig.relative_attention_num_buckets=7"],
        ["relative_attention_num_buckets = 7", "multiple of 4"],
    ),
    "negative seed": ([TINY, "--gin.RANDOM_SEED=-1"], ["seed = -1"]),
    "samples of no tokens": ([TINY, "--gin.Experiment.sample_length=0"], ["sample_length"]),
    # Devices
    "empty mesh": ([TINY, "--gin.MESH={}"], ["mesh = {}", "'data': -1"]),
    "mesh that is a list": ([TINY, "--gin.MESH=[1]"], ["mesh = [1]", "dict"]),
    "mesh axis of no device": ([TINY, "--gin.MESH={'data': 0}"], ["MESH", "positive"]),
    "model wider than the machine": (
        [TINY, "--gin.ModelConfig.d_model=100000000"],
        ["parameters", "GiB", "are free", "d_model"],
    ),
    "more experts than the machine holds": (
        [TINY, "--gin.NUM_EXPERTS=100000000"],
        ["parameters", "GiB", "num_experts"],
    ),
    "more layers than any model": (
        [TINY, "--gin.ModelConfig.num_encoder_layers=1000000"],
        ["num_encoder_layers = 1000000", "10000"],
    ),
    "64 bits that are not enabled": (
        [TINY, "--gin.ModelConfig.dtype=float64"],
        ["float64", "JAX_ENABLE_X64"],
    ),
    # Data
    "targets too short": (
        [TINY, "--gin.TASK_FEATURE_LENGTHS={'inputs': 128, 'targets': 10}"],
        ["'targets': 10", "set 'targets': 29"],
    ),
    "length that is no number": (
        [TINY, "--gin.TASK_FEATURE_LENGTHS={'inputs': 'a', 'targets': 9}"],
        ["task_feature_lengths", "'a'"],
    ),
    "too much noise": ([TINY, "--gin.DataConfig.noise_density=2.0"], ["noise_density = 2.0"]),
    "vocabulary file that is none": (
        [TINY, "--gin.DataConfig.vocabulary={tmp}/fake.model"],
        ["fake.model"],
    ),
    "less data than a batch": ([TEXT, "--gin.TEXT_FILES={tmp}/short.txt"], ["short.txt"]),
    "folder for a data file": ([TEXT, "--gin.TEXT_FILES={tmp}"], ["{tmp}"]),
    "data that is no text": ([TEXT, "--gin.TEXT_FILES={tmp}/latin.txt"], ["latin.txt"]),
    "plain text called .gz": ([TEXT, "--gin.TEXT_FILES={tmp}/not_gzip.txt.gz"], ["not_gzip"]),
    "unknown extension": ([TEXT, "--gin.TEXT_FILES={tmp}/text.gin"], ["text.gin"]),
    "rows without text": ([TEXT, "--gin.TEXT_FILES={tmp}/no_text.jsonl"], ["no_text", "text"]),
    "table without the column": (
        ["--gin_file={tmp}/supervised.gin", "--gin.TEXT_FILES={tmp}/table.tsv"],
        ["table.tsv", "inputs", "question"],
    ),
    "mixture of a task that is none": (["--gin_file={tmp}/mixture.gin"], ["wn_defin"]),
    "two tasks of one name": (
        ["--gin_file={tmp}/twins.gin", "--gin.TEXT_FILES={tmp}/short.txt"],
        ["text_file", "rename"],
    ),
    "data set that is not prepared": (["--gin_file={tmp}/tfds.gin"], ["glue/rte"]),
    # Run directories and checkpoints
    "directory without a name": ([TINY, "--gin.MODEL_DIR="], ["model_dir", "path"]),
    "directory that cannot be made": ([TINY, "--gin.MODEL_DIR=/proc/x"], ["MODEL_DIR", "/proc/x"]),
    "directory whose config.json is none": (
        [TINY, "--gin.MODEL_DIR={tmp}/no_json"],
        ["no_json/config.json", "not JSON"],
    ),
    "checkpoints of unknown origin": (
        [TINY, "--gin.MODEL_DIR={tmp}/unknown"],
        ["unknown", "without a config.json"],
    ),
    "complete run without checkpoints": (
        [TINY, "--gin.MODEL_DIR={tmp}/gone"],
        ["gone", "checkpoints are gone"],
    ),
    "run without a good checkpoint": (
        [TINY, "--gin.MODEL_DIR={tmp}/damaged"],
        ["damaged/checkpoints", "step 7", "params/array has 4 bytes instead of 8"],
    ),
    "run that has parameters only": (
        [TINY, "--gin.MODEL_DIR={tmp}/partial"],
        ["partial/checkpoints", "step 7", "optimizer is missing"],
    ),
    "initial checkpoint that is damaged": (
        [TINY, "--gin.INITIAL_CHECKPOINT_PATH={tmp}/damaged"],
        ["checkpoints/7 is damaged", "params/array"],
    ),
    "initial checkpoint that is a file": (
        [TINY, "--gin.INITIAL_CHECKPOINT_PATH={tmp}/short.txt"],
        ["INITIAL_CHECKPOINT_PATH", "short.txt"],
    ),
    "initial checkpoint that is nothing orbax wrote": (
        [TINY, "--gin.INITIAL_CHECKPOINT_PATH={tmp}/unknown"],
        ["unknown/checkpoints/7", "cannot be read"],
    ),
    # Hugging Face folders
    "Hugging Face folder that is none": (["hf.load", "{tmp}/nowhere"], ["nowhere", "folder"]),
    "Hugging Face folder that is a run": (["hf.load", "{tmp}/other"], ["other", "supported"]),
    "configuration of another model": (["hf.load", "{tmp}/bert"], ["'bert'", "t5"]),
    "configuration without a width": (["hf.load", "{tmp}/no_width"], ["config.json", "'d_model'"]),
    "configuration with half a layer": (
        ["hf.load", "{tmp}/half"],
        ["config.json", "num_layers = 1.5", "integer"],
    ),
    "configuration with a nameless activation": (
        ["hf.load", "{tmp}/nameless"],
        ["config.json", "7", "activation"],
    ),
    "pickled weights": (["hf.load", "{tmp}/pickled"], ["pickled", "safetensors"]),
    "no weights": (["hf.load", "{tmp}/weightless"], ["weightless", "model.safetensors"]),
    "weights cut off": (["hf.load", "{tmp}/cut"], ["cut/model.safetensors"]),
    "shard outside the folder": (["hf.load", "{tmp}/outside"], ["'../model.safetensors'"]),
    "shard that is missing": (["hf.load", "{tmp}/shardless"], ["model-00001.safetensors"]),
}


def write_folders(folder: pathlib.Path) -> None:
    """Run directories and Hugging Face folders of `CASES`."""

    def write(path: str, content: str) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content.replace("{tmp}", str(folder)))

    experiment = configuration.build(Experiment, ["gin_configs/switch_tiny.gin"])
    config = json.dumps(dataclasses.asdict(experiment))
    for name in ("other", "gone", "damaged", "partial"):
        write(f"{name}/config.json", config)
    write("no_json/config.json", "{")
    write("gone/DONE", "")
    for name in ("unknown", "damaged", "partial"):
        write(f"{name}/checkpoints/7/params/array", "half")
        write(f"{name}/metrics.jsonl", '{"step": 7}\n')
    manifest = {"array": {"bytes": 8, "sha256": ""}}
    write("damaged/checkpoints/7/params/checksums.json", json.dumps(manifest))
    index = "model.safetensors.index.json"
    for name, config, files in (
        ("bert", HF_CONFIG | {"model_type": "bert"}, {}),
        ("no_width", {key: HF_CONFIG[key] for key in HF_CONFIG if key != "d_model"}, {}),
        ("half", HF_CONFIG | {"num_layers": 1.5}, {}),
        ("nameless", HF_CONFIG | {"feed_forward_proj": 7}, {}),
        ("pickled", HF_CONFIG, {"pytorch_model.bin": "x"}),
        ("weightless", HF_CONFIG, {}),
        ("cut", HF_CONFIG, {"model.safetensors": "\x08"}),
        ("outside", HF_CONFIG, {index: '{"weight_map": {"x": "../model.safetensors"}}'}),
        ("shardless", HF_CONFIG, {index: '{"weight_map": {"x": "model-00001.safetensors"}}'}),
    ):
        write(f"{name}/config.json", json.dumps(config))
        if name in ("bert", "no_width", "half", "nameless"):
            empty = b"\x02\0\0\0\0\0\0\0{}"
            (folder / name / "model.safetensors").write_bytes(empty)
        for file, content in files.items():
            write(f"{name}/{file}", content)
    (folder / "latin.txt").write_bytes("ärger und öde\n".encode("latin-1") * 50)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, tuple[int | str, str]]:
    folder = tmp_path_factory.mktemp("mistakes")
    for name, text in FILES.items():
        (folder / name).write_text(text.replace("{tmp}", str(folder)))
    write_folders(folder)
    before = contents(folder)

    def arguments(name: str) -> list[str]:
        given = [argument.replace("{tmp}", str(folder)) for argument in CASES[name][0]]
        if given[:1] != ["hf.load"] and not any("MODEL_DIR=" in argument for argument in given):
            given.append(f"--gin.MODEL_DIR={folder}/runs/{name.replace(' ', '_')}")
        return given if name != "no configuration" else []

    completed = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps([arguments(name) for name in CASES]),
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "XLA_FLAGS"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    results = json.loads(completed.stdout.splitlines()[-1])
    after = contents(folder)
    # No case changes or removes a file, and none claims a directory.
    assert {path: after.get(path) for path in before} == before
    assert not [path for path in after if path not in before]
    return dict(zip(CASES, map(tuple, results), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_mistake_gives_one_line_and_exit_code_2(outcomes, name):
    code, message = outcomes[name]
    assert code == 2, (code, message)
    assert "Traceback" not in message
    for part in CASES[name][1]:
        assert part.replace("{tmp}", "") in message, message
    lines = [line for line in message.splitlines() if "error:" in line]
    assert len(lines) == 1, message
    assert len(lines[0]) < 600
