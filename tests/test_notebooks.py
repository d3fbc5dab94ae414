"""Library notebooks and tutorials pass as tests, each in a process of its own and in a copy of the repository."""
import os
import sys
import traceback

import pytest
from conftest import REPO, Project, begin, warm

ELSEWHERE = ("stages", "benchmarks")
NOTEBOOKS = [p.relative_to(REPO / "nbs") for p in sorted((REPO / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
NOTEBOOKS = [p.as_posix() for p in NOTEBOOKS if p.parts[0] not in ELSEWHERE]
LONG = {  # over about two seconds, by room; `make test` leaves them out
    "algorithms": "01_weights 02_soft_head 03_prototypes 04_fedgen 04a_class_gradients 05_creff",
    "algorithms/a2v": "01_averaging 03_client_generators 04_checkpoints 05_runs 07_guide",
    "algorithms/joint": "01_gradients 03_moving_geometry 06_networks 08_bank 09_losses 10_watch 11_result 12_trainer 14_arms",
    "core": "04_options 07_random 11_schedules",
    "data": "01_parquet 09e_sharp 09f_image_ops 09g_policies 10_long_tail 19_audio 20_sounds 22_featurizers",
    "evaluation": "04_distances 05_fidelity 07_readouts 09_training 13_joint_results 18_sounds 19_sound_runs 20_audit 21_deployed",
    "federated": "02_local 03_clients 04_aggregate 05_ledger 06c_aggregation 07a_work 07b_result 07c_server 07d_kept 08_loop 09_trained 11_setup 12_apart",
    "federated/engines": "01_base 01b_serial 02_batched 04_workers 06_flower 07_nodes",
    "finetune": "04_finetune 05_repairs 08_trained_arms 09_head_arms 11_apart",
    "generators": "01_base 02_gaussian 03_align 04_safs 05_mlp 07_fedgen_net 08_fedgen 09_resample 10_latent_diffusion "
        "11_unet 12_ldmlr 13_run 16_feature_nets 17_making 18_latent_nets",
    "generators/diffusion": "01_schedule 02_samplers 03_denoiser 04_frame 05_federated",
    "": "index",
    "models": "02_heads 04_networks 05a_lenet_zhu 07_encode 08_adapters",
    "models/losses": "02_base 03_matching 04_contrastive 05_geometry 06_local",
    "pipeline": "09_kernels 14_tune 16_open 18_script 22_deployed 22a_deployed_node 22b_deployed_server",
    "privacy": "01_accountant 03_release 04_clipping 05_record_dp 10_local_privacy 12_users 20_robust 21_faults 22_secure_sum 31_read_updates 32_read_features 33_budgets",
    "privacy/attacks": "03_statistics 04_labels 05_first_layer 06_inversion 07_imprint 09_roc 10_membership 10b_lira 11_copying 12_epsilon",
    "report": "03_cells 04_card 06_exporter 07_index 08_publish",
    "report/plots": "00_style 01_axes 02_data 03_training 04_features 05_results 05a_encoders 06_differences 07_classes 08_joint 08a_sounds",
    "stats": "03_moments 04_radius 06_prototypes 07_teachers",
    "tutorials": "by_hand feda2v frozen_features own_data own_parts users",
}
SLOW = {f"{room}/{name}.ipynb".lstrip("/") for room, names in LONG.items() for name in names.split()}
def run_notebook(notebook, home, env, log):
    "Everything a fresh interpreter would do, but with the libraries that fedgal rests on already imported."
    begin(env, home, log, log)
    from nbdev.test import test_nb
    try: passed = test_nb(str(home / "nbs" / notebook), skip_flags=["slow"], basepath=str(home), cell_timeout=300)[0]
    except BaseException: traceback.print_exc(); passed = False
    sys.stdout.flush()
    os._exit(not passed)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return Project.make(tmp_path_factory.mktemp("notebooks") / "project", all_notebooks=True)


def test_the_long_notebooks_are_there(): assert set(NOTEBOOKS) >= SLOW, "a notebook was moved or removed: change `LONG`"


@pytest.mark.parametrize("notebook", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in NOTEBOOKS])
def test_notebook(notebook, repository, tmp_path):
    env = {k: v for k, v in repository.env().items() if k not in ("FEDGAL_ROOT", "FEDGAL_ARTIFACTS", "FEDGAL_REPORTS")}
    process = warm().Process(target=run_notebook, args=(notebook, repository.home, env, tmp_path / "log"))
    process.start()
    process.join(900)
    if process.is_alive(): process.kill()
    assert process.exitcode == 0, (tmp_path / "log").read_text()[-4000:]
