"""Clustering: agreement that names do not change, all examples at once, and no label in sight of training."""

import json
from itertools import permutations

import numpy as np
import pytest
import torch

from fdiv.adapters.classifier import Classifier
from fdiv.methods.represent.reconstruction import Reconstruction
from fdiv.networks.autoencoder import Autoencoder
from fdiv.tasks.clustering import Clustering, agreement, matched

NEW = torch.Generator
LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])


def test_other_names_for_the_same_groups_agree_fully():
    for names in permutations(range(3)):
        clusters = torch.tensor(names)[LABELS]
        assert agreement(LABELS, clusters) == pytest.approx({"accuracy": 1.0, "nmi": 1.0, "ari": 1.0})
        assert torch.equal(matched(LABELS, clusters), LABELS)


def test_accuracy_is_that_of_the_best_of_all_matchings():
    for seed in range(10):
        clusters = torch.randint(0, 3, (8,), generator=NEW().manual_seed(seed))
        best = max(
            (torch.tensor(n)[clusters] == LABELS).double().mean().item() for n in permutations(range(3))
        )
        assert agreement(LABELS, clusters)["accuracy"] == pytest.approx(best)


def test_more_clusters_than_classes_leave_some_unmatched_and_fewer_match_no_class_twice():
    many = torch.tensor([0, 0, 3, 1, 1, 2, 2, 2])
    assert matched(LABELS, many).tolist() == [0, 0, -1, 1, 1, 2, 2, 2]
    few = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    assert agreement(LABELS, few)["accuracy"] == pytest.approx(6 / 8)
    one = torch.zeros(8, dtype=torch.long)
    assert agreement(LABELS, one) == pytest.approx({"accuracy": 3 / 8, "nmi": 0.0, "ari": 0.0})


def test_all_examples_are_handed_over_without_their_labels():
    data = Clustering("iris").examples(None, 10**6, NEW())
    assert (data.inputs.shape, data.labels.tolist()) == ((150, 4), [0] * 150)
    torch.testing.assert_close(data.inputs.std(0), torch.ones(4), atol=1e-5, rtol=0)
    assert Clustering("digits").examples(None, 10**6, NEW()).inputs.max() == 1
    assert (Clustering("iris").outputs, Clustering("iris", clusters=5).outputs) == (3, 5)
    with pytest.raises(ValueError, match=r"train\.examples: 150 or more"):
        Clustering("iris").examples(None, 100, NEW())


def test_a_reference_is_measured_by_its_features_and_a_student_by_its_scores():
    task = Clustering("iris", restarts=3)
    model = Classifier.fresh(Autoencoder(width=8, layers=1, latent=2), torch.Size([4]), 3, seed=0)
    data = task.examples(None, 1000, NEW())
    as_reference = task.evaluate(model, model, {}, 0)["scalars"]
    assert as_reference["accuracy"] == as_reference["features accuracy"]
    with torch.no_grad():
        model.model.head.weight.zero_()
    as_student = task.evaluate(model, None, {}, 0)["scalars"]
    assert as_student["accuracy"] == pytest.approx(1 / 3)  # all in one cluster
    assert as_student["features accuracy"] == as_reference["features accuracy"]
    assert len(data.inputs) == 150


def test_k_means_on_irises_is_as_good_as_it_is_known_to_be():
    # On standardised irises two of the classes overlap: 0.83 of the flowers, an adjusted Rand index of 0.62.
    model = Classifier.fresh(Autoencoder(width=8, layers=1, latent=2), torch.Size([4]), 3, seed=0)
    scalars = Clustering("iris").evaluate(model, None, {}, 0)["scalars"]
    assert scalars["inputs accuracy"] == pytest.approx(0.83, abs=0.02)
    assert scalars["inputs ari"] == pytest.approx(0.62, abs=0.02)


def test_the_evaluation_is_what_a_report_reads():
    model = Classifier.fresh(Autoencoder(width=8, layers=1, latent=2), torch.Size([4]), 3, seed=0)
    found = Clustering("iris", restarts=2).evaluate(model, None, {}, 0)
    names = {f"{who}{name}" for who in ("", "features ", "inputs ") for name in ("accuracy", "nmi", "ari")}
    assert found["scalars"].keys() == names
    assert np.isfinite(list(found["scalars"].values())).all()
    json.dumps(found)


def test_what_a_clustering_does_not_have_is_refused():
    task = Clustering("iris")
    for wrong, says in (({"clusters": 1}, "at least 2"), ({"restarts": 0}, "restarts")):
        with pytest.raises(ValueError, match=says):
            Clustering("iris", **wrong)
    with pytest.raises(ValueError, match="validate_every"):
        task.held_out(None)
    with pytest.raises(ValueError, match="no log_prior"):
        task.log_prior(task.examples(None, 1000, NEW()))
    with pytest.raises(ValueError, match="'truth'"):
        task.examples("noisy", 1000, NEW())
    assert Clustering.default_method == Reconstruction()
