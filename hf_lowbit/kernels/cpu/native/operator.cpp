// Operators of torch's for CPU tensors without Python: a compiled graph calls them hundreds of times for every token.
// Written against torch's stable C interface (torch/csrc/stable/c/shim.h), whose functions are given by address, so that
// nothing is linked and no header of torch is read. What they do not know goes to operators in Python.
#include <algorithm>
#include <cstring>
#include <iterator>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "lowbit.h"

namespace {

constexpr uint64_t interface_version = (uint64_t{2} << 56) | (uint64_t{10} << 48);  // as torch 2.10 has it
constexpr size_t most_known = 1 << 16;
hfl_torch torch;
int32_t type_codes[3];  // torch's, by hfl_type

// Matrices that are multiplied together, as Python has described them.
struct Known {
    std::string specs, activation;
    std::vector<int64_t> numbers;
    int limit;       // of the codes that inputs become; 0: they stay as they are
    int64_t groups;  // with scales of their own, of each input
    std::vector<hfl_matrix> matrices;
    std::vector<bool> has_table;  // among the tensors; others have their format's
};
using Found = std::shared_ptr<const Known>;
std::unordered_map<const void*, Found> known;  // by the address of the first codes
std::unordered_map<int64_t, Found> kept;       // by the first number
std::shared_mutex guard;

template <class Handle>
Handle handle(uint64_t value) { return reinterpret_cast<Handle>(value); }

template <class Result>
Result get(int32_t (*function)(void*, Result*), void* object) {
    Result result{};
    function(object, &result);
    return result;
}

void* place(void* tensor) { return get(torch.get_data_ptr, tensor); }

bool is_plain(void* tensor) { return get(torch.is_contiguous, tensor) && get(torch.get_device_type, tensor) == 0; }

bool is_text(void* string, const std::string& text) {
    return get(torch.string_length, string) == text.size() &&
           !std::memcmp(get(torch.string_c_str, string), text.data(), text.size());
}

// The tensors of a list argument.
class Tensors {
   public:
    explicit Tensors(void* list) : list_(list), size_(get(torch.list_size, list)) {}
    void* next() {
        uint64_t item = 0;
        return at_ < size_ && !torch.list_get_item(list_, at_++, &item) ? handle<void*>(item) : nullptr;
    }
    bool lie_at(std::initializer_list<const void*> places) {
        for (const void* expected : places) {
            if (!expected) continue;
            void* tensor = next();
            if (!tensor || place(tensor) != expected || !is_plain(tensor)) return false;
        }
        return true;
    }
    bool are_all_read() const { return at_ == size_; }

   private:
    void* list_;
    size_t size_, at_ = 0;
};

bool has_shape(void* tensor, int64_t rows, int64_t columns) {
    const int64_t* sizes = get(torch.get_sizes, tensor);
    return get(torch.get_dim, tensor) == 2 && sizes[0] == rows && sizes[1] == columns;
}

template <class Key>
Found look_up(const std::unordered_map<Key, Found>& all, Key key) {
    std::shared_lock<std::shared_mutex> lock(guard);
    const auto at = all.find(key);
    return at == all.end() ? nullptr : at->second;
}

// hf_lowbit::products (Tensor x, Tensor[] stored, str specs, int columns, str activation). An operator offers
//   find(stack): the matrices of its arguments; null: not described yet, or they lie differently by now;
//   release(stack): lets go of what the stack holds beside the input.
struct OfStored {
    enum { X, STORED, SPECS, COLUMNS, ACTIVATION };
    static inline std::string elsewhere;  // the operator in Python

    static Found find(const uint64_t* stack) {
        void* list = handle<void*>(stack[STORED]);
        Tensors tensors(list), shapes(list);
        void* first = Tensors(list).next();
        const Found found = first ? look_up(known, static_cast<const void*>(place(first))) : nullptr;
        if (!found || !is_text(handle<void*>(stack[SPECS]), found->specs) ||
            !is_text(handle<void*>(stack[ACTIVATION]), found->activation))
            return nullptr;
        for (size_t i = 0; i < found->matrices.size(); i++) {
            const hfl_matrix& w = found->matrices[i];
            const bool has_table = found->has_table[i];
            if (w.columns != static_cast<int64_t>(stack[COLUMNS]) ||
                !tensors.lie_at({w.codes, w.scales, w.zeros, has_table ? w.table : nullptr}) ||
                !has_shape(shapes.next(), w.rows, w.words) ||
                !has_shape(shapes.next(), w.one_scale ? 1 : w.rows, w.groups))
                return nullptr;
            for (int companions = (w.zeros != nullptr) + has_table; companions > 0; companions--) shapes.next();
        }
        return tensors.are_all_read() ? found : nullptr;
    }
    static void release(const uint64_t* stack) {
        Tensors stored(handle<void*>(stack[STORED]));
        while (void* tensor = stored.next()) torch.delete_tensor(tensor);
        torch.delete_list(handle<void*>(stack[STORED]));
        torch.delete_string(handle<void*>(stack[SPECS]));
        torch.delete_string(handle<void*>(stack[ACTIVATION]));
    }
};

// hf_lowbit::kept_products (Tensor x, int[] numbers, int rows, str activation).
struct OfKept {
    enum { X, NUMBERS, ROWS, ACTIVATION };
    static inline std::string elsewhere;

    static Found find(const uint64_t* stack) {
        void* list = handle<void*>(stack[NUMBERS]);
        const size_t size = get(torch.list_size, list);
        auto number = [&](size_t i) {
            uint64_t item = 0;
            torch.list_get_item(list, i, &item);
            return static_cast<int64_t>(item);
        };
        const Found found = size ? look_up(kept, number(0)) : nullptr;
        if (!found || found->numbers.size() != size || !is_text(handle<void*>(stack[ACTIVATION]), found->activation))
            return nullptr;
        for (size_t i = 1; i < size; i++)
            if (found->numbers[i] != number(i)) return nullptr;
        return found;
    }
    static void release(const uint64_t* stack) {
        torch.delete_list(handle<void*>(stack[NUMBERS]));
        torch.delete_string(handle<void*>(stack[ACTIVATION]));
    }
};

// Products of inputs as they are (limit 0), or of the codes they become. Returns 0, or -1.
int multiply(const Known& found, const void* x, int type, int64_t tokens, void* const* y) {
    std::vector<const hfl_matrix*> matrices;
    for (const hfl_matrix& matrix : found.matrices) matrices.push_back(&matrix);
    const int count = static_cast<int>(matrices.size()), limit = found.limit;
    const int64_t columns = matrices[0]->columns, groups = found.groups;
    uint32_t threads = 1;
    torch.get_num_threads(&threads);
    const auto all = static_cast<int>(threads);
    if (!limit) return hfl_linear(matrices.data(), count, x, type, tokens, columns, y, all);
    std::vector<int8_t> codes(static_cast<size_t>(tokens * columns));
    std::vector<float> scales(static_cast<size_t>(tokens * groups));
    if (hfl_quantize(x, type, tokens, columns, groups, limit, codes.data(), scales.data())) return -1;
    return hfl_linear_int8(matrices.data(), count, codes.data(), scales.data(), groups, tokens, type, y, all);
}

// The products with x, one after the other in a new tensor; null where Python has to make them.
void* products(void* x, const Known& found) {
    const int32_t code = get(torch.get_dtype, x);
    int type = 0;
    while (type < 3 && type_codes[type] != code) type++;
    const auto dimensions = static_cast<size_t>(get(torch.get_dim, x));
    if (type == 3 || dimensions < 1 || !is_plain(x)) return nullptr;
    const int64_t columns = get(torch.get_sizes, x)[dimensions - 1], elements = get(torch.get_numel, x);
    if (columns != found.matrices[0].columns || !elements) return nullptr;
    const int64_t tokens = elements / columns, one = 1;
    int64_t size = 0;
    for (const hfl_matrix& matrix : found.matrices) {
        if (tokens > torch.most_tokens && !hfl_multiplies_many(&matrix, found.limit ? HFL_INT8 : type)) return nullptr;
        size += tokens * matrix.rows;
    }
    void* result = nullptr;
    if (torch.empty_strided(1, &size, &one, code, 0, -1, &result)) return nullptr;  // no memory: Python says so
    std::vector<void*> places;
    char* next = static_cast<char*>(place(result));
    for (const hfl_matrix& matrix : found.matrices) {
        places.push_back(next);
        next += tokens * matrix.rows * (type == HFL_FLOAT32 ? 4 : 2);
    }
    if (multiply(found, place(x), type, tokens, places.data())) {
        torch.delete_tensor(result);
        return nullptr;
    }
    return result;
}

// Called by torch's dispatcher: takes the arguments from the stack and puts the result there.
template <class Operator> void infer(uint64_t* stack, uint64_t, uint64_t) {
    void* x = handle<void*>(stack[Operator::X]);
    const Found found = Operator::find(stack);
    void* result = found ? products(x, *found) : nullptr;
    if (!result) {
        if (torch.call_dispatcher(Operator::elsewhere.c_str(), "", stack, interface_version))
            throw std::runtime_error(torch.exception_what ? torch.exception_what() : Operator::elsewhere + " failed");
        return;
    }
    torch.delete_tensor(x);
    Operator::release(stack);
    stack[0] = reinterpret_cast<uint64_t>(result);
}

template <class Operator> int implement(void* library, const char* name, const char* python_operator) {
    Operator::elsewhere = python_operator;
    return torch.library_impl(library, name, infer<Operator>, interface_version) ? -1 : 0;
}

}  // namespace

extern "C" {

int hfl_register_operators(const hfl_torch* functions) {
    torch = *functions;
    type_codes[HFL_FLOAT32] = torch.dtype_float32();
    type_codes[HFL_BFLOAT16] = torch.dtype_bfloat16();
    type_codes[HFL_FLOAT16] = torch.dtype_float16();
    void* library = nullptr;
    if (torch.library_init_impl("hf_lowbit", "CPU", __FILE__, __LINE__, &library)) return -1;
    return implement<OfStored>(library, "products", "hf_lowbit::products_of_python") ||
                   implement<OfKept>(library, "kept_products", "hf_lowbit::kept_products_of_python")
               ? -1
               : 0;
}

void hfl_know(const hfl_matrix* const* matrices, const int* has_table, int count, const char* specs,
              const int64_t* numbers, const char* activation, int limit, int64_t groups) {
    Known now{specs, activation, {}, limit, groups, {}, {}};
    for (int i = 0; i < count; i++) {
        now.matrices.push_back(*matrices[i]);
        now.has_table.push_back(has_table[i] != 0);
        if (numbers) now.numbers.push_back(numbers[i]);
    }
    const void* first = now.matrices[0].codes;
    const auto found = std::make_shared<const Known>(std::move(now));
    std::unique_lock<std::shared_mutex> lock(guard);
    if (numbers) { kept[numbers[0]] = found; return; }
    if (known.size() >= most_known) known.clear();
    known[first] = found;
}

void hfl_forget(int64_t number) {
    std::unique_lock<std::shared_mutex> lock(guard);
    for (auto at = kept.begin(); at != kept.end();) {
        const std::vector<int64_t>& numbers = at->second->numbers;
        at = std::find(numbers.begin(), numbers.end(), number) != numbers.end() ? kept.erase(at) : std::next(at);
    }
}

}  // extern "C"
