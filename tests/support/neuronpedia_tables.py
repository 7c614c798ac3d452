"""The columns of the tables that Neuronpedia imports into, as its schema.prisma of 2026-09 has them.

`!`: it has to be given (no default, not nullable). `[]`: a list. Text where nothing is said.
"""

from typing import Any

TYPES: dict[str, type | tuple[type, ...]] = {"text": str, "int": int, "float": (int, float), "bool": bool, "json": dict}

TABLES = {
    "SourceRelease": (
        "name! visibility isNewUi:bool featured:bool description! descriptionShort urls:text[] creatorEmail "
        "creatorName! creatorNameShort creatorId! defaultSourceSetName defaultSourceId defaultUmapSourceIds:text[]"
    ),
    "Model": (
        "id! displayNameShort displayName creatorId! tlensId openRouterId dimension:int thinking:bool visibility "
        "inferenceEnabled:bool instruct:bool layers:int! neuronsPerLayer:int! owner! website"
    ),
    "SourceSet": (
        "modelId! name! hasDashboards:bool allowInferenceSearch:bool visibility description! type creatorName! "
        "urls:text[] creatorEmail creatorId! releaseName hasGraphs:bool graphEnabled:bool similarityMatrixEnabled:bool "
        "defaultRange:int defaultShowBreaks:bool showDfa:bool showCorrelated:bool showHeadAttribution:bool "
        "showUmap:bool"
    ),
    "Source": (
        "id! modelId! hasDashboards:bool inferenceEnabled:bool saelensConfig:json saelensRelease saelensSaeId hfRepoId "
        "hfFolderId visibility setName! creatorId! hasUmap:bool hasUmapLogSparsity:bool hasUmapClusters:bool "
        "num_prompts:int num_tokens_in_prompt:int dataset notes cosSimMatchModelId cosSimMatchSourceId"
    ),
    "Neuron": (
        "modelId! layer! index! sourceSetName creatorId maxActApprox:float hasVector:bool vector:float[] vectorLabel "
        "vectorDefaultSteerStrength:float hookName topkCosSimIndices:int[] topkCosSimValues:float[] "
        "neuron_alignment_indices:int[] neuron_alignment_values:float[] neuron_alignment_l1:float[] "
        "correlated_neurons_indices:int[] correlated_neurons_pearson:float[] correlated_neurons_l1:float[] "
        "correlated_features_indices:int[] correlated_features_pearson:float[] correlated_features_l1:float[] "
        "neg_str:text[] neg_values:float[] pos_str:text[] pos_values:float[] frac_nonzero:float "
        "freq_hist_data_bar_heights:float[] freq_hist_data_bar_values:float[] logits_hist_data_bar_heights:float[] "
        "logits_hist_data_bar_values:float[] decoder_weights_dist:float[] umap_cluster:int "
        "umap_log_feature_sparsity:float umap_x:float umap_y:float"
    ),
    "Activation": (
        "id! tokens:text[] dataIndex index! layer! modelId! dataSource maxValue:float! maxValueTokenIndex:int! "
        "minValue:float! values:float[] dfaValues:float[] dfaTargetIndex:int dfaMaxValue:float zQIndices:int[] "
        "zKIndices:int[] zValues:float[] creatorId! lossValues:float[] logitContributions binMin:float binMax:float "
        "binContains:float qualifyingTokenIndex:int"
    ),
}
FILES = {"release": "SourceRelease", "model": "Model", "sourceset": "SourceSet", "source": "Source"}  # one row each
BATCHES = {"features": "Neuron", "activations": "Activation"}
KEYS = {
    "SourceRelease": ("name",),
    "Model": ("id",),
    "SourceSet": ("modelId", "name"),
    "Source": ("modelId", "id"),
    "Neuron": ("modelId", "layer", "index"),
    "Activation": ("id",),
}
HANGS_ON = {
    "SourceSet": ((("modelId",), "Model"), (("releaseName",), "SourceRelease")),
    "Source": ((("modelId", "setName"), "SourceSet"),),
    "Neuron": ((("modelId", "layer"), "Source"), (("modelId", "sourceSetName"), "SourceSet")),
    "Activation": ((("modelId", "layer", "index"), "Neuron"),),
}  # columns, and the table whose key they are


def columns(table: str) -> dict[str, tuple[str, bool]]:
    """Type and whether it has to be given, of each column."""
    found = {}
    for column in TABLES[table].split():
        name, _, kind = column.rstrip("!").partition(":")
        found[name] = (kind or "text", column.endswith("!"))
    return found


def faults(table: str, row: dict[str, Any]) -> list[str]:
    """Say what of a row the table would refuse."""
    known = columns(table)
    found = [f"{name} is no column" for name in row if name not in known]
    found += [f"{name} is missing" for name, (_, needed) in known.items() if needed and row.get(name) is None]
    for name, value in row.items():
        if name not in known:
            continue
        kind, _ = known[name]
        values = value if kind.endswith("[]") else [value] * (value is not None)
        one = TYPES[kind.removesuffix("[]")]
        if not isinstance(values, list) or not all(isinstance(each, one) for each in values):
            found.append(f"{name} is no {kind}: {value!r:.40}")
    return found
