//! Arguments as Python passes them: tensors, the tuples that hold them, codes; and the checks that functions share.

use moekern_core::gemm::Activation;
use moekern_core::vector::{DType, Isa};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyInt;
use pyo3::{intern, wrap_pyfunction};

/// Where a tensor's elements begin: of None or 0 nowhere, else by its `data_ptr()`, or an address as a number.
#[derive(Clone, Copy)]
pub struct Address(usize);

impl<'a, 'py> FromPyObject<'a, 'py> for Address {
    type Error = PyErr;

    fn extract(tensor: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        if tensor.is_none() {
            return Ok(Self(0));
        }
        if tensor.is_instance_of::<PyInt>() {
            return Ok(Self(tensor.extract()?));
        }
        Ok(Self(tensor.call_method0(intern!(tensor.py(), "data_ptr"))?.extract()?))
    }
}

impl Address {
    /// For reading.
    pub fn read<T>(self) -> *const T {
        self.0 as *const T
    }

    /// For writing.
    pub fn write<T>(self) -> *mut T {
        self.0 as *mut T
    }

    /// Whether nothing is there.
    pub fn is_null(self) -> bool {
        self.0 == 0
    }
}

/// Structures that Python passes as named tuples. They are taken by position: looking fields up by name would cost a call
/// 0.2 us. `fields` in `_core` lists the names, and a test compares them with those of the tuples.
macro_rules! named_tuples {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty),* $(,)? })*) => {
        $(
            $(#[$doc])*
            pub struct $name { $(pub $field: $type),* }

            impl<'a, 'py> FromPyObject<'a, 'py> for $name {
                type Error = PyErr;

                fn extract(tuple: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
                    let ($($field,)*) = tuple.extract()?;
                    Ok(Self { $($field),* })
                }
            }
        )*

        /// See `python/moekern/_core.pyi`.
        #[pyfunction]
        fn fields() -> Vec<(&'static str, Vec<&'static str>)> {
            vec![$((stringify!($name), vec![$(stringify!($field)),*])),*]
        }
    };
}
named_tuples! {
    /// A plan's tensors.
    PlanTensors { order: Address, inverse: Address, offsets: Address }
    /// The experts' parameters.
    Weights { w_gate_up: Address, w_down: Address, b_gate_up: Address, b_down: Address }
    /// The formula and the layout of weights.
    Form { activation: ActivationName, transposed: bool, interleaved: bool, top_k: usize }
    /// Sizes of the weights.
    Sizes { experts: usize, hidden: usize, inter: usize, features: usize }
    /// Sizes of tokens and of their rows.
    TokenSizes { tokens: usize, hidden: usize, top_k: usize, experts: usize }
    /// The gradients, or where they go.
    Gradients { x: Address, scores: Address, w_gate_up: Address, w_down: Address, b_gate_up: Address, b_down: Address }
}

/// An activation, by its name.
pub struct ActivationName(pub Activation);

impl<'a, 'py> FromPyObject<'a, 'py> for ActivationName {
    type Error = PyErr;

    fn extract(name: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let name: &str = name.extract()?;
        let found = Activation::ALL.into_iter().find(|activation| activation.name() == name);
        found.map(Self).ok_or_else(|| {
            let accepted = Activation::ALL.map(Activation::name).join(", ");
            PyValueError::new_err(format!("activation: got {name:?}, expected one of {accepted}"))
        })
    }
}

/// The element type of the CPU's GEMMs with this code.
pub fn dtype(code: u8) -> PyResult<DType> {
    match DType::from_code(code) {
        Some(dtype) if dtype != DType::F64 => Ok(dtype),
        _ => Err(PyValueError::new_err(format!("dtype: code {code}; accepted: 0 (fp32), 2 (bf16), 3 (fp16)"))),
    }
}

/// The instruction set in use, or why the one that the environment requests is not.
pub fn isa() -> PyResult<Isa> {
    Isa::current().map_err(|error| PyValueError::new_err(error.to_string()))
}

/// Fails unless the product of `sizes`, in elements of `dtype`, fits in an address range.
pub fn check_size(name: &str, dtype: DType, sizes: &[usize]) -> PyResult<()> {
    let bytes = sizes.iter().try_fold(dtype.size(), |product, &size| product.checked_mul(size));
    match bytes {
        Some(bytes) if isize::try_from(bytes).is_ok() => Ok(()),
        _ => Err(PyValueError::new_err(format!("{name}: shape {sizes:?} exceeds the address range"))),
    }
}

/// Fails unless all of these tensors are there.
pub fn check_present(tensors: &[(&str, Address)]) -> PyResult<()> {
    match tensors.iter().find(|(_, address)| address.is_null()) {
        Some((name, _)) => Err(PyValueError::new_err(format!("{name}: null pointer"))),
        None => Ok(()),
    }
}

/// Adds what is here to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(fields, module)?)
}
