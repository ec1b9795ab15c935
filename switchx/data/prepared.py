"""TFDS data sets that lie prepared on disk."""

from typing import Any

from switchx.errors import UserError, closest


def find_builder(tfds_name: str, data_dir: str | None, *, download: bool = False) -> Any:
    """The TFDS builder of a prepared data set, e.g. 'glue/rte:2.0.0' (None: TFDS's own folder).

    Raises:
      UserError: no such data set, or one that is not prepared, with the command that prepares it.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(tfds_name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        name = tfds_name.split("/")[0].split(":")[0]
        hint = closest(name, tfds.list_builders(with_community_datasets=False))
        raise UserError(f"TFDS has no dataset {tfds_name!r}{hint[:200]}") from error
    except (ValueError, AssertionError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"TFDS dataset {tfds_name!r} is not usable: {reason}") from error
    if not builder.info.splits and download:
        builder.download_and_prepare()
    if not builder.info.splits:
        where = f", data_dir={data_dir!r}" if data_dir else ""
        raise UserError(
            f"TFDS dataset {tfds_name!r} is not prepared under "
            f'{str(builder.data_dir)!r}; on a machine with a network run: python -c "import '
            f"tensorflow_datasets as tfds; tfds.builder('{tfds_name}'{where})"
            '.download_and_prepare()" (or set TfdsTask.download = True)'
        )
    return builder
